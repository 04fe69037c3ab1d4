"""Checkpoints of a state, a named tuple of arrays, by Orbax. All use of Orbax is in this file."""

import contextlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ghm_jax.distributed.processes import is_first, raise_together
from ghm_jax.exceptions import ConfigError
from ghm_jax.json_text import parse_json
from ghm_jax.storage import is_bucket, move, remove_tree

State = TypeVar("State", bound=Any)
"""A named tuple of arrays."""


class CheckpointFailed(RuntimeError):  # noqa: N818 (it is what happened)
    """A checkpoint could not be written; older ones are kept. The message is one line."""


def check_location(directory: Path) -> None:
    """Raises ConfigError if Orbax cannot keep checkpoints in a directory of this name.

    Orbax lists the files of a checkpoint by a glob of the whole path, without an error if it finds
    none, and takes gs:/ and the like for a bucket.
    """
    path = str(directory.resolve()) + os.sep
    bad = re.search(r"[*?\[\\\0\ud800-\udfff]|:/", path.removeprefix("gs://"))
    if not bad:
        return
    what, remedy = f"'{bad[0]}'", "whose whole path has none of * ? [ \\"
    if bad[0] == ":/":
        what, remedy = "a name that ends in ':'", "and mount a bucket as a directory"
    elif bad[0] not in "*?[\\":
        what, remedy = "what is no text", "with a path in UTF-8"
    raise ConfigError(
        str(directory),
        f"checkpoints could not be read back from {path!r}, which contains {what}",
        f"choose another `run_dir`, {remedy}",
    )


def complete_steps(directory: Path) -> list[int]:
    """The steps in a directory of checkpoints that can be restored if nothing is damaged, in order.

    On a disk Orbax renames a checkpoint when it is complete; in a bucket, where nothing can be
    renamed, it writes a last object into it.
    """
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())
    if is_bucket(directory):
        steps = [step for step in steps if (directory / str(step) / _COMPLETE).exists()]
    return steps


class Checkpoints:
    """The checkpoints of a run; use it as a context manager, so that pending saves finish.

    A checkpoint appears under its step once it is complete, and only then are older ones removed:
    all but the newest `keep` and the `keep_best` of highest AP.
    """

    def __init__(self, directory: Path, keep: int = 1, keep_best: int = 0) -> None:
        self._directory = directory.resolve()
        policies = ocp.checkpoint_managers
        keep_any = [policies.LatestN(keep), _Best(keep_best)]
        self._options = ocp.CheckpointManagerOptions(
            best_fn=_average_precision,
            preservation_policy=policies.AnyPreservationPolicy(keep_any),
        )
        self._manager = self._open()
        self._check_listing()
        self._unverified: tuple[int, int] | None = None  # the first save: step, arrays
        self._verified = False

    def _open(self) -> ocp.CheckpointManager:
        try:
            return ocp.CheckpointManager(
                str(self._directory),  # which becomes a path of Orbax's own kind
                options=self._options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )
        except Exception as error:  # it reads what every checkpoint says of itself
            damaged = next(
                filter(None, map(_damaged_note, sorted(self._directory.glob("*")))), None
            )
            if damaged:
                raise ConfigError(
                    str(damaged), "damaged; it holds no part of the state", "delete it"
                ) from error
            raise ConfigError(
                str(self._directory),
                f"its checkpoints cannot be listed ({_first_line(error)})",
                ""
                if isinstance(error, OSError)
                else "delete the files _CHECKPOINT_METADATA in it, which hold no part of a state",
            ) from error

    def _check_listing(self) -> None:
        """Raises ConfigError if Orbax did not see every checkpoint in a bucket: to it, an object
        that cannot be asked for does not exist."""
        if not is_bucket(self._directory):
            return
        try:
            there = complete_steps(self._directory)
        except OSError as error:
            there, why = [], f"cannot be listed ({error.strerror})"
        else:
            why = f"only {len(self.steps)} of {len(there)} checkpoints can be seen"
            if there == self.steps:
                return
        raise ConfigError(str(self._directory), why, "try again when the bucket answers")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps done at every checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, ap: float | None = None) -> None:
        """Starts to save in the background; a step that is already saved is not saved again.

        Args:
            step: steps done.
            state: to be saved; its memory may be reused as soon as this returns.
            ap: its AP, if it was evaluated.

        Raises:
            CheckpointFailed: this save could not start, or the previous one did not finish.
            ConfigError: see `check`.
        """
        if self._unverified is not None:
            self.wait()
        if self.latest != step:
            plain = _plain(state)
            with self._failing():
                notes = {"AP": _UNKNOWN if ap is None else ap, _CHECKSUM: _checksum(_named(plain))}
                self._manager.save(step, args=ocp.args.StandardSave(plain), metrics=notes)
            if is_first() and not self._verified:
                self._unverified = step, len(jax.tree.leaves(plain))

    def check(self) -> None:
        """Checks on pending saves without waiting.

        Raises:
            CheckpointFailed: a save in the background did not finish.
            ConfigError: the first checkpoint is complete, but cannot be read back.
        """
        with self._failing():
            first = self._unverified is not None
            # Asked first: the save may fail in between.
            first_done = first and not self._manager.is_saving_in_progress()
            self._manager.check_for_errors()
        if first_done:
            self._verify()

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
            CheckpointFailed: it could not be written.
            ConfigError: see `check`.
        """
        with self._failing():
            self._manager.wait_until_finished()
        self._verify()

    def _verify(self) -> None:
        """Raises ConfigError if the first checkpoint that was saved does not have all arrays.

        Once, and by their number, so that a run whose checkpoints are of no use, whatever the
        reason, ends at the first one and not after its last.
        """
        if self._unverified is None:
            return
        (step, wanted), self._unverified = self._unverified, None
        if not (self._directory / str(step)).is_dir():  # it was not saved, which is told elsewhere
            return
        try:
            found = len(_array_names(self._directory / str(step) / "default"))
            why = f"{found} of {wanted} arrays" if found != wanted else ""
        except Exception as error:  # whatever the storage raises
            why = _first_line(error)
        if why:
            raise ConfigError(
                str(self._directory / str(step)),
                f"the first checkpoint of the run cannot be read back ({why[:80]})",
                "choose another `run_dir`, on another disk or with a simple path",
            )
        self._verified = True

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever Orbax and the file system raise becomes one line, and saving can continue."""
        try:
            yield
        except Exception as error:  # OSError, ValueError of tensorstore, ...: the disk is full
            if jax.process_count() == 1:  # otherwise the others wait: all must be restarted
                with contextlib.suppress(Exception):
                    self._manager.close()
                self.remove_fragments()
                self._manager = self._open()
            self._unverified = None
            raise CheckpointFailed(_first_line(error)) from error

    def remove_fragments(self) -> None:
        """Removes what interrupted saves left behind. Do not call it while a process saves."""
        if not is_first():
            return
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            remove_tree(path)
        if is_bucket(self._directory):  # where a save begins under its final name
            complete = set(complete_steps(self._directory))
            for path in self._directory.glob("*"):
                if path.name.isdecimal() and int(path.name) not in complete:
                    remove_tree(path)

    def restore(
        self, like: State, *, skipped: Callable[[int, str], None] = lambda step, why: None
    ) -> State:
        """The newest state that can be read, shaped and placed as `like`.

        Args:
            like: arrays, or ShapeDtypeStructs.
            skipped: called with the steps and the reason of every damaged checkpoint that is newer.

        Raises:
            ConfigError: there is none, or it does not fit `like`.
        """
        problem = ConfigError(str(self._directory), "no checkpoint", "train the run first")
        for step in reversed(self.steps):
            path = self._directory / str(step)
            try:
                return self._restore(step, like)
            except ConfigError as error:
                problem, why = error, str(error)
            except Exception as error:  # whatever a parser raises for half a file
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                problem = ConfigError(
                    str(path), f"cannot be read ({why[:100]})", "train the run from scratch"
                )
            skipped(step, why[:200])
        raise problem

    def _restore(self, step: int, like: State) -> State:
        path = self._directory / str(step)
        notes = path / "metrics" / "metrics"
        checksum = _object_in(notes).get(_CHECKSUM) if notes.exists() else None
        _read_through(path / "default", checksum)
        # Compared first: Orbax itself fails in the middle of reading, with pages of details.
        saved, expected = _shapes(self._manager.item_metadata(step)), _shapes(_plain(like))
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                raise ConfigError(
                    str(path),
                    f"does not fit the run's model: {name} is {saved.get(name)}, "
                    f"not {expected.get(name)}",
                    "train the run from scratch",
                )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        plain = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return type(like)(**plain)

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that its step can be saved again; gives the new path."""
        path = self._directory / str(step)
        new = _aside(path)
        with raise_together():  # the other processes must not look before it is gone
            if is_first():
                move(path, new)
        self._manager.reload()
        return new


def set_aside_damaged_notes(directory: Path, say: Callable[[str], None]) -> None:
    """Renames what Orbax reads of every checkpoint when it lists them, where it is damaged.

    It would list none of them. These files hold no part of a state: what is lost is the AP of a
    checkpoint, and its checksum. Do not call it while another process saves.

    Args:
        directory: of the checkpoints.
        say: called with a line for each file.
    """
    for step in complete_steps(directory):
        while (file := _damaged_note(directory / str(step))) and file.is_file():
            new = file.replace(_aside(file))
            say(f"{file}: damaged, moved to {new.name}; it holds no part of the state")


_UNKNOWN = -1.0
_COMPLETE = "commit_success.txt"
_CHECKSUM = "crc32"  # of all arrays; older checkpoints have none


def _average_precision(notes: Any) -> float:
    ap = notes.get("AP") if isinstance(notes, Mapping) else None
    return ap if isinstance(ap, int | float) else _UNKNOWN


def _aside(path: Path) -> Path:
    """The path of something damaged when it is moved out of the way."""
    new, number = path.with_name(f"{path.name}.damaged"), 2
    while new.exists():
        new, number = path.with_name(f"{path.name}.damaged{number}"), number + 1
    return new


def _damaged_note(checkpoint: Path) -> Path | None:
    """The file of those that Orbax reads when it lists checkpoints that is damaged, if one is."""
    for file in (checkpoint / "metrics" / "metrics", checkpoint / "_CHECKPOINT_METADATA"):
        try:
            if file.exists():
                _object_in(file)
        except (OSError, ValueError):
            return file
    return None


def _object_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises OSError or ValueError if there is none."""
    value = parse_json(file.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return value


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the `count` checkpoints of highest AP. Orbax's BestN would rank checkpoints without an
    AP first, or warn about each."""

    def __init__(self, count: int) -> None:
        self._count = count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        aps = {info.step: _average_precision(info.metrics) for info in checkpoints if info.metrics}
        scored = sorted((step for step in aps if aps[step] != _UNKNOWN), key=aps.__getitem__)
        best = scored[len(scored) - min(self._count, len(scored)) :]
        return [info.step in best for info in checkpoints]


def _first_line(error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line), "")
    return f"{type(error).__name__}: {reason}"[:200]


def _read_through(path: Path, checksum: int | None) -> None:
    """Reads everything in a checkpoint; raises whatever the storage does if it is damaged.

    Orbax reads everything at once, and logs every failure but one. And it notices no change of an
    array above 1 KB: only the smaller ones, which OCDBT keeps in its nodes, have checksums.
    """
    for file in [path / "_METADATA", path / "_sharding", *path.glob("array_metadatas/*")]:
        if file.exists():
            _object_in(file)
    found = _checksum(_stored(path))
    if checksum not in (None, found):
        raise ValueError("an array is not what was saved (its checksum differs)")


def _checksum(arrays: Iterable[tuple[str, Any]]) -> int:
    """Of names, types, shapes and values; the arrays must be in the order of their names."""
    total = 0
    for name, array in arrays:
        values = np.asarray(array)
        total = zlib.crc32(f"{name} {values.dtype} {values.shape}".encode(), total)
        total = zlib.crc32(values.tobytes(), total)
    return total


def _stored(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a checkpoint one by one, in the order of their names."""
    for name in _array_names(path):
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": path.as_uri() + "/", "path": f"{name}/"},
            "fill_missing_data_reads": False,
        }
        yield name, ts.open(spec).result().read().result()


def _array_names(path: Path) -> list[str]:
    """The names of the arrays of a checkpoint, in order."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": path.as_uri() + "/"}).result()
    keys = [key.decode() for key in store.list().result()]
    return sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))


def save_tree(path: Path, tree: Any) -> None:
    """Saves any tree of arrays, by this process alone; `path` must not exist."""
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        checkpointer.save(path.resolve(), tree)
    (path / _CHECKSUM).write_text(f"{_checksum(_named(tree))}\n")


def restore_tree(path: Path, like: Any) -> Any:
    """What `save_tree` saved, as NumPy arrays; `like` has its shapes and types.

    Raises:
        Exception: whatever the storage does if it is damaged.
    """
    path = path.resolve()
    checksum = path / _CHECKSUM  # older ones have none
    _read_through(path, int(checksum.read_text()) if checksum.exists() else None)
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(path, target)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Options to save without waiting for other processes, which may already have their file."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}"
    )


def _plain(state: Any) -> dict[str, Any]:
    """The state as a dict of its fields, so that the names on disk are those in the code."""
    return state._asdict()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves by their dotted names."""
    return {name: tuple(leaf.shape) for name, leaf in _named(tree)}


def _named(tree: Any) -> list[tuple[str, Any]]:
    """All leaves with their dotted names, which are those on disk, in order."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return sorted(leaves.items())

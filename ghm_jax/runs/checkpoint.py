"""Checkpoints of a state, a named tuple of arrays, by Orbax. All use of Orbax is in this file."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ghm_jax.distributed.processes import is_first, raise_together
from ghm_jax.exceptions import ConfigError
from ghm_jax.json_text import parse_json

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
    bad = re.search(r"[*?\[\\\0\ud800-\udfff]|:/", path)
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
        self._unverified: tuple[int, int] | None = None  # the first save: step, arrays
        self._verified = False

    def _open(self) -> ocp.CheckpointManager:
        try:
            return ocp.CheckpointManager(
                self._directory,
                options=self._options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )
        except ValueError as error:  # it reads the metrics of every checkpoint
            for file in sorted(self._directory.glob("*/metrics/metrics")):
                try:
                    parse_json(file.read_bytes())
                except ValueError:
                    step = file.parent.parent
                    raise ConfigError(
                        str(step), "this checkpoint is damaged (its metrics)", f"delete {step}"
                    ) from error
            raise

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
            metrics = {"AP": _UNKNOWN if ap is None else ap}
            with self._failing():
                self._manager.save(step, args=ocp.args.StandardSave(_plain(state)), metrics=metrics)
            if is_first() and not self._verified:
                self._unverified = step, len(jax.tree.leaves(_plain(state)))

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
            keys = _open_store(self._directory / str(step) / "default").list().result()
            found = sum(key.endswith(b"/.zarray") for key in keys)
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
        if is_first():
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

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
        _read_through(self._directory / str(step) / "default")
        # Compared first: Orbax itself fails in the middle of reading, with pages of details.
        saved, expected = _shapes(self._manager.item_metadata(step)), _shapes(_plain(like))
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                raise ConfigError(
                    str(self._directory / str(step)),
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
        new, number = path.with_name(f"{step}.damaged"), 2
        while new.exists():
            new, number = path.with_name(f"{step}.damaged{number}"), number + 1
        with raise_together():  # the other processes must not look before it is gone
            if is_first():
                path.rename(new)
        self._manager.reload()
        return new


_UNKNOWN = -1.0


def _average_precision(metrics: Any) -> float:
    return metrics["AP"]


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


def _read_through(path: Path) -> None:
    """Reads everything in a checkpoint; raises whatever the storage does if it is damaged.

    Orbax finds the same faults, but reads everything at once and logs every other failure.
    """
    store = _open_store(path)
    for key in store.list().result():
        store.read(key).result()


def _open_store(path: Path) -> Any:
    """The keys and values of a checkpoint."""
    return ts.KvStore.open({"driver": "ocdbt", "base": path.as_uri() + "/"}).result()


def save_tree(path: Path, tree: Any) -> None:
    """Saves any tree of arrays, by this process alone; `path` must not exist.

    It appears under its name once it is complete.
    """
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        checkpointer.save(path.resolve(), tree)


def restore_tree(path: Path, like: Any) -> Any:
    """What `save_tree` saved, as NumPy arrays; `like` has its shapes and types."""
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(path.resolve(), target)


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
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }

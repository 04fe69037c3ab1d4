"""Checkpoints of the train state, by Orbax. All use of Orbax is in this file."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ghm_jax.config import ConfigError
from ghm_jax.step import TrainState


class Checkpoints:
    """The checkpoints of a run; use it as a context manager, so that pending saves finish."""

    def __init__(self, directory: Path, keep: int = 1) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(
            directory.resolve(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save in the background; a step that is saved already is not saved again."""
        if self.latest != step:
            self._manager.save(step, args=ocp.args.StandardSave(_plain(state)))

    def wait(self) -> None:
        """Until what was saved lies on disk."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, shaped and placed as `like` (arrays, or ShapeDtypeStructs).

        Raises:
            ConfigError: there is none, or it does not fit `like`.
        """
        step = self.latest
        if step is None:
            raise ConfigError(f"{self._manager.directory}: no checkpoint; train the run first")
        # Compared first: Orbax itself fails in the middle of reading, with pages of details.
        saved, wanted = _shapes(self._manager.item_metadata(step)), _shapes(_plain(like))
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ConfigError(
                    f"{self._manager.directory / str(step)}: does not fit the run's model: "
                    f"{name} is {saved.get(name)}, not {wanted.get(name)}; train the run anew"
                )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        plain = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return TrainState(**plain)


def save_tree(path: Path, tree: Any) -> None:
    """Saves arrays that are no state, by this process alone; `path` must not exist.

    It appears under its name when it is whole.
    """
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        checkpointer.save(path.resolve(), tree)


def restore_tree(path: Path, like: Any) -> Any:
    """What `save_tree` saved, as NumPy arrays; `like` has its shapes and types."""
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(path.resolve(), target)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Without waiting for other processes, which may have found their file already."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}"
    )


def _plain(state: TrainState) -> dict[str, Any]:
    """The state as a dict of its fields, so that the names on disk are those in the code."""
    return state._asdict()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves by their dotted names."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }

"""Checkpoints of the train state, by Orbax. All use of Orbax is in this file."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ghm_jax.config import ConfigError
from ghm_jax.step import TrainState


class Checkpoints:
    """The checkpoints of a run; use it as a context manager, so that pending saves finish."""

    def __init__(self, directory: Path, keep: int = 1) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

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
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        try:
            plain = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except ValueError as error:
            raise ConfigError(
                f"{self._manager.directory / str(step)}: does not fit the run's model "
                f"({str(error).splitlines()[0]})"
            ) from error
        return TrainState(**plain)


def _plain(state: TrainState) -> dict[str, Any]:
    """The state as a dict of its fields, so that the names on disk are those in the code."""
    return state._asdict()

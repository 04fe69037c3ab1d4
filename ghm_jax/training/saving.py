"""When a run saves its state, and what happens when saving fails."""

import time
from collections.abc import Callable

from ghm_jax.progress import Progress
from ghm_jax.runs.checkpoint import CheckpointFailed, Checkpoints
from ghm_jax.training.state import TrainState


class Saver:
    """Saves at the steps that the config sets. A checkpoint that fails does not end the training.

    With several processes none knows whether another one failed, and they cannot ask while the
    devices run: then a failure ends the job, which resumes from the previous checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        progress: Progress,
        *,
        every: int,
        retry_after: int,
        alone: bool = True,
        place: Callable[[TrainState], TrainState] = lambda state: state,
    ) -> None:
        """
        Args:
            checkpoints: of the run.
            progress: receives messages.
            every: steps between two checkpoints.
            retry_after: steps from a failed one to the next try.
            alone: this is the only process of the job.
            place: called for each state that is saved. Under pmap every process of a job holds its
                own copy of the state, and Orbax expects a single one.
        """
        self._checkpoints, self._progress = checkpoints, progress
        self._alone, self._place = alone, place
        self._every, self._retry_after = every, retry_after
        self._retry: int | None = None

    def save_if_due(
        self, done: int, state: TrainState, *, ap: float | None, before: Callable[[], None]
    ) -> None:
        """Starts to save in the background if a checkpoint is due.

        Args:
            done: steps.
            state: after them.
            ap: its AP if it was just evaluated; such a state is always saved.
            before: called before a state is saved.

        Raises:
            CheckpointFailed: in a job of several processes.
        """
        try:
            self._checkpoints.check()
            if done % self._every == 0 or ap is not None or done == self._retry:
                before()
                self._checkpoints.save(done, self._place(state), ap)
        except CheckpointFailed as failed:
            if not self._alone:
                raise
            self._retry = done + self._retry_after
            self._progress.say(
                f"a checkpoint could not be written ({failed}); older ones are kept, next try at "
                f"step {self._retry}"
            )

    def save_last(self, done: int, state: TrainState, pause: float = 10.0) -> None:
        """Saves and waits until the state is on disk; a single process retries twice, `pause`
        seconds apart, as a disk may be full temporarily.

        Raises:
            CheckpointFailed: the last try failed.
        """
        tries, state = 3 if self._alone else 1, self._place(state)
        for left in reversed(range(tries)):
            try:
                self._checkpoints.save(done, state)
                self._checkpoints.wait()
                return
            except CheckpointFailed as failed:
                if not left:
                    raise CheckpointFailed(
                        f"step {done} could not be saved ({failed}); the newest checkpoint is that "
                        f"of step {self._checkpoints.latest}: free some space and run the same "
                        "command to resume from it"
                    ) from failed
                self._progress.say(
                    f"step {done} could not be saved ({failed}), trying again in {pause:.0f} s"
                )
                time.sleep(pause)

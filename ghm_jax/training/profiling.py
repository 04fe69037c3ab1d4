"""A JAX profile of some steps of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Profiles the steps `first` to `last`, both included.

    The profile begins and ends when the devices are idle, so that it holds exactly these steps; the
    loop waits for them twice. A run that resumes between these steps profiles the rest.
    """

    def __init__(
        self,
        directory: Path,
        steps: tuple[int, int] | None,
        say: Callable[[str], None],
        shown: Path | None = None,
    ) -> None:
        """
        Args:
            directory: gets `plugins/profile/`, as TensorBoard expects.
            steps: the first and the last one; None: no profile.
            say: called with a line when it is written.
            shown: the directory to name in it; None: `directory`.
        """
        self._shown = shown or directory
        self._directory, self._steps, self._say = directory, steps, say
        self._running = False
        self._latest: Any = ()
        self._annotation: Any = None

    def before(self, step: int) -> None:
        """Call before step number `step` reads its batch."""
        if self._steps is None:
            return
        first, last = self._steps
        if not self._running and first <= step <= last:
            jax.block_until_ready(self._latest)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        if self._running:
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def after(self, step: int, outputs: Any) -> None:
        """Call after step number `step` was dispatched; `outputs` are its results."""
        self._latest = outputs
        if self._running:
            self._annotation.__exit__(None, None, None)
            if self._steps is not None and step >= self._steps[1]:
                self.close()

    def close(self) -> None:
        """Writes the profile, of fewer steps if the run ended before the last one."""
        if not self._running:
            return
        self._running = False
        try:
            jax.block_until_ready(self._latest)
            jax.profiler.stop_trace()
            self._say(f"profile written to {self._shown / 'plugins/profile'}")
        except Exception as error:  # a full disk, for example
            self._say(f"the profile could not be written ({error}); training continues")

"""Signals that ask a run to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ghm_jax.progress import Progress


class TrainingInterrupted(RuntimeError):  # noqa: N818 (it is what happened)
    """The run was asked to stop and wrote a checkpoint. The message is one line."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.preempted = number == signal.SIGTERM
        """SIGTERM: the machine was preempted, which is no failure of the run."""


class StopRequest(threading.Event):
    """Set when the run should stop."""

    number: int = 0
    """The signal that set it."""


@contextlib.contextmanager
def stop_on_signal(progress: Progress) -> Iterator[StopRequest]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts immediately.

    In the middle of a step the memory of the old state is already reused, so a run can only stop
    between steps. Outside the main thread nothing is caught.
    """
    stopping = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def on_signal(number: int, frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.number = number
        stopping.set()
        progress.say("stopping after this step ... (press Ctrl-C again to quit without saving)")

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

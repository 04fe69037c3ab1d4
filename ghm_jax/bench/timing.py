"""Times of calls that are compared with each other."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Times(NamedTuple):
    """Milliseconds of some calls."""

    wall: np.ndarray
    """f64[calls, repeats]."""
    cpu: np.ndarray
    """f64[calls, repeats], CPU time of all threads."""


def time_rounds(calls: Sequence[Callable[[], Any]], repeats: int) -> Times:
    """Times calls in rounds, so that other work on the machine affects all of them alike.

    A round is every call once, alternating between forward and reverse order. One round before the
    timed ones warms up.
    """
    times = np.zeros((2, len(calls), repeats + 1))
    for i in range(repeats + 1):
        order = range(len(calls)) if i % 2 else reversed(range(len(calls)))
        for j in order:
            start, cpu_start = time.perf_counter(), time.process_time()
            calls[j]()
            times[0, j, i] = 1e3 * (time.perf_counter() - start)
            times[1, j, i] = 1e3 * (time.process_time() - cpu_start)
    return Times(times[0, :, 1:], times[1, :, 1:])

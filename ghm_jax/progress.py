"""How a long job reports its progress."""

import shutil
import time
from collections.abc import Mapping
from typing import Any, Protocol

from tqdm import tqdm

_COLUMNS = 100  # if the width of the terminal is unknown
_SHORTEST_BAR = 8


class Progress(Protocol):
    """Receives progress updates from a job; `Silent` and `Bar` implement it."""

    def say(self, line: str) -> None:
        """Shows one line."""
        ...

    def update(self, name: str, done: int, total: int, fields: Mapping[str, str]) -> None:
        """`done` of `total` units of the job `name` are finished; `fields` are shown with them."""
        ...

    def close(self) -> None:
        """The job has finished or stopped."""
        ...


class Silent:
    """Shows nothing."""

    def say(self, line: str) -> None: ...

    def update(self, name: str, done: int, total: int, fields: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A line in a terminal or a notebook that is updated in place: units done, time left, as many
    of the fields as fit, and a bar if there is room for one.

    Used as a context manager it is closed however the job ends, before an error is shown.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._job: tuple[str, int] | None = None  # name and total of what the bar shows
        # By job: the units that were done at its first update, and the time of that update.
        self._starts: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        tqdm.write(line)

    def update(self, name: str, done: int, total: int, fields: Mapping[str, str]) -> None:
        if self._job != (name, total):
            self.close()
        columns = shutil.get_terminal_size((_COLUMNS, 24)).columns - 1
        text = status(name, done, total, self._left(name, done, total), fields, columns)
        room = columns - len(text) - 1
        line = "{desc} {bar}" if room >= _SHORTEST_BAR else "{desc}"
        if self._bar is None:
            self._job = name, total
            self._bar = tqdm(
                desc=text,
                total=total,
                initial=done,
                mininterval=0.5,
                ncols=columns,
                bar_format=line,
            )
        self._bar.ncols, self._bar.bar_format, self._bar.desc = columns, line, text
        self._bar.update(done - self._bar.n)

    def _left(self, name: str, done: int, total: int) -> float | None:
        """Seconds left, at the average pace since the first update; interruptions count."""
        now = time.perf_counter()
        first, start = self._starts.get(name, (done, now))
        if first >= done:
            self._starts[name] = done, now
            return None
        return (now - start) / (done - first) * (total - done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._job = None


def status(
    name: str, done: int, total: int, left: float | None, fields: Mapping[str, str], columns: int
) -> str:
    """The state of a job on one line of at most `columns` characters (name, counts and time left
    are always there, even if they need more).

    Args:
        name, done, total: units done of which job.
        left: seconds left; None: not known yet.
        fields: values by name; the first one that does not fit is omitted, and all after it.
        columns: characters.
    """
    text = f"{name} {done}/{total}, "
    text += "? left" if left is None else f"{tqdm.format_interval(left)} left"
    for i, (field, value) in enumerate(fields.items()):
        longer = f"{text}{' ' if i else ': '}{field} {value}"
        if len(longer) > columns:
            break
        text = longer
    return text

"""How a long job speaks to whoever started it."""

import shutil
import time
from collections.abc import Mapping
from typing import Protocol

from tqdm import tqdm

_COLUMNS = 100  # where nobody says how wide the terminal is
_SHORTEST_BAR = 8


class Progress(Protocol):
    """What a job calls; `Silent` and `Bar` are the two listeners."""

    def say(self, line: str) -> None:
        """One line of news."""
        ...

    def update(self, name: str, done: int, total: int, fields: Mapping[str, str]) -> None:
        """`done` of `total` units of the job `name` are finished."""
        ...

    def close(self) -> None:
        """The job is over, or has stopped."""
        ...


class Silent:
    """Says nothing."""

    def say(self, line: str) -> None: ...

    def update(self, name: str, done: int, total: int, fields: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A line that is written over, in a terminal or a notebook: what is done, how long the rest
    takes, as many of the fields as there is room for, and a bar where room is left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._job: tuple[str, int] | None = None  # name and total of what the bar shows
        # When a job was first heard of, and how much of it was done then.
        self._starts: dict[str, tuple[int, float]] = {}

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
        """Seconds, at the pace since the first update, whatever came between."""
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
    """The state of a job in one line of at most `columns`, where that much is needed at all.

    Args:
        name, done, total: what has been done of which job.
        left: seconds that the rest takes; None: not known yet.
        fields: by name; those that do not fit any more are left out, the first one and all after.
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

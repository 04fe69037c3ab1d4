"""How a long job speaks to whoever started it."""

from collections.abc import Mapping
from typing import Protocol

from tqdm import tqdm


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
    """A progress bar with remaining time, in a terminal or a notebook."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        tqdm.write(line)

    def update(self, name: str, done: int, total: int, fields: Mapping[str, str]) -> None:
        if self._bar is None or self._bar.desc != name or self._bar.total != total:
            self.close()
            self._bar = tqdm(
                desc=name, total=total, initial=done, dynamic_ncols=True, mininterval=0.5
            )
            self._bar.desc = name
        self._bar.set_postfix_str(", ".join(f"{k} {v}" for k, v in fields.items()), refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""A lock on a run's directory: one job at a time trains there.

The lock is a file that is created only if it does not exist, and removed at the end. A job that was
killed leaves it behind: on the same machine that shows at once, because its process is gone; the
lock of another machine (or container) is a leftover if its job has not renewed it for a while.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ghm_jax.exceptions import ConfigError
from ghm_jax.json_text import parse_json
from ghm_jax.storage import create, now_at, remove_if, touch

LOCK = "training.lock"
"""Name of the file."""
RENEWED_EVERY = 20.0
"""Seconds between two signs of life of the process that holds a lock."""
SILENCE = 180.0
"""Seconds without a sign of life after which the lock of another machine is a leftover. Network
file systems show a change up to a minute late."""


class _Holder(NamedTuple):
    """The process that holds a lock."""

    host: str
    pid: int
    started: str
    """When; empty if it cannot be told. A process id is used again, also after a restart."""
    place: str
    """Where the process id means something: a boot of a machine, and the container."""


class Lock:
    """A lock that this process holds."""

    def __init__(self, file: Path) -> None:
        """Creates the file; raises FileExistsError if it exists."""
        self.file = file
        """Where it is now; to be changed by whoever moves the directory."""
        self._text = json.dumps(_this_process()._asdict())
        create(file, self._text)
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="lock of a run", daemon=True).start()

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):
                if self._is_held():
                    touch(self.file)

    def _is_held(self) -> bool:
        """Whether it is still this process's: a person may have deleted it."""
        return _read(self.file) == self._text

    def release(self) -> None:
        """Removes the file."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._is_held():
                self.file.unlink()


@contextlib.contextmanager
def lock_directory(directory: Path, say: Callable[[str], None]) -> Iterator[Lock]:
    """Locks a run's directory, which must exist, until the end of the block.

    Args:
        directory: of the run.
        say: called with one line if a lock is taken over that a killed job has left.

    Raises:
        ConfigError: another job has locked it.
        OSError: the lock cannot be written.
    """
    lock = _acquire(directory, say)
    try:
        yield lock
    finally:
        lock.release()


def describe_lock(directory: Path) -> tuple[bool, str]:
    """Whether a job may be training in a run's directory, and one line about its lock, empty if
    there is none. Nothing is written.

    Raises:
        OSError: the lock cannot be read.
    """
    file = directory / LOCK
    text = _read(file)
    if text is None:
        return False, ""
    holder = _parse(text)
    in_use, seen = _may_be_there(holder, lambda: max(0.0, time.time() - file.stat().st_mtime))
    if in_use:
        return True, f"is being trained by {_name(holder)}{seen}"
    return False, f"stale lock of {_name(holder)}{seen}; the next job takes it over"


def _acquire(directory: Path, say: Callable[[str], None]) -> Lock:
    file = directory / LOCK
    while True:
        try:
            return Lock(file)
        except FileExistsError:
            text = _read(file)
        if text is None:  # removed just now
            continue
        holder = _parse(text)
        _refuse_if_in_use(directory, file, holder)
        if remove_if(file, text):
            say(f"{directory}: took over the stale lock of {_name(holder)}")


def _refuse_if_in_use(directory: Path, file: Path, holder: _Holder | None) -> None:
    """Raises ConfigError if the process that holds the lock may still be there."""
    in_use, seen = _may_be_there(holder, lambda: _age(file))
    if not in_use:
        return
    remedy = "wait for its end, or choose another `run_dir`"
    if seen:
        remedy += f"; if that job is gone, try again in {SILENCE / 60:.0f} minutes or delete {file}"
    raise ConfigError(str(directory), f"is being trained by {_name(holder)}{seen}", remedy)


def _may_be_there(holder: _Holder | None, age: Callable[[], float]) -> tuple[bool, str]:
    """Whether the process that holds a lock may still be there, and what tells so in words.

    Args:
        holder: as the lock names it.
        age: seconds since its last sign of life, which is asked for only where the process cannot
            be looked up: it is on another machine, or unknown.
    """
    if holder is not None and holder.place == _this_process().place:
        return _is_running(holder), ""
    seconds = age()
    return seconds < SILENCE, f" (last sign of life {seconds:.0f} s ago)"


def _read(file: Path) -> str | None:
    """The content of a lock; None if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> _Holder | None:
    """The process that a lock names; None if it does not, because it is only half written."""
    with contextlib.suppress(ValueError, TypeError):
        holder = _Holder(**parse_json(text))
        if all(type(a) is type(b) for a, b in zip(holder, _this_process(), strict=True)):
            return holder
    return None


def _name(holder: _Holder | None) -> str:
    if holder is None:
        return "an unknown process"
    here = " (this one)" if holder == _this_process() else ""
    return f"process {holder.pid}{here} on {holder.host}"


def _age(file: Path) -> float:
    """Seconds since the last sign of life, both by the clock of the file system."""
    now = now_at(file)
    try:
        return max(0.0, now - file.stat().st_mtime)
    except FileNotFoundError:
        return SILENCE


def _this_process() -> _Holder:
    pid = os.getpid()
    return _Holder(platform.node(), pid, _status(pid)[1], _place())


def _place() -> str:
    parts: list[Any] = [platform.node()]
    with contextlib.suppress(OSError):  # Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_running(holder: _Holder) -> bool:
    """Whether a process of this machine is there, and not another one with its id."""
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    state, started = _status(holder.pid)
    return state not in "ZX" and (not started or started == holder.started)


def _status(pid: int) -> tuple[str, str]:
    """State and start of a process as Linux tells them; `?` and empty if it cannot be told."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "?", ""

"""Files and directories: written atomically, moved aside, never overwritten by accident.

A place on a disk is a `pathlib.Path`, one in a bucket a `ghm_jax.bucket.BucketPath` with the
same methods. Only what the two do differently is a function here.
"""

import contextlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ghm_jax.exceptions import ArgumentError, ConfigError

if TYPE_CHECKING:
    from ghm_jax.bucket import BucketPath


def as_path(location: str | Path) -> Path:
    """The place that a path, or a gs://BUCKET/... in text, names.

    The bucket is asked for once, so that a wrong one is an error before anything else is done.

    Raises:
        ConfigError: the bucket cannot be used, or it is one of another kind.
    """
    if not isinstance(location, str):
        return location
    scheme, separator, _ = location.partition("://")
    if not (separator and re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme)):
        return Path(location)
    if scheme != "gs":
        problem = f"only directories and gs://... can be used, not {scheme}://..."
        raise ConfigError(location, problem, "mount it as a directory, or use gs://BUCKET/DIR")

    from ghm_jax.bucket import BucketPath, check_bucket

    check_bucket(location)
    return cast(Path, BucketPath(location.rstrip("/")))


def is_bucket(path: Path) -> bool:
    """Whether a place is in a bucket."""
    return _in_bucket(path) is not None


def _in_bucket(path: Path) -> "BucketPath | None":
    return cast("BucketPath", path) if hasattr(path, "copy_to") else None


def telling_of_retries(
    path: Path, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """A block in which it is said once if requests to the bucket of `path` fail and are repeated;
    on a disk there are none."""
    if not is_bucket(path):
        return contextlib.nullcontext()

    from ghm_jax import bucket

    return bucket.telling_of_retries(say)


def unused_directory(path: str | Path) -> Path:
    """A directory for output that does not exist or is empty, so that nothing is overwritten.

    Raises:
        ArgumentError: it is in use.
    """
    path = as_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError("out", f"{path} is not empty", "choose a new directory")
    return path


def set_aside(path: Path) -> Path:
    """Renames an old run, so that nothing is lost; returns its new path."""
    stem = f"{path.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"
    new, number = path.with_name(stem), 2
    while new.exists():
        new, number = path.with_name(f"{stem}-{number}"), number + 1
    return move(path, new)


def move(path: Path, new: Path) -> Path:
    """Renames a directory; returns the new path, where nothing may be.

    In a bucket every object is copied, and only then the old ones are removed, `config.json` first:
    a directory whose removal was interrupted is not taken for a run.
    """
    place, target = _in_bucket(path), _in_bucket(new)
    if place is None or target is None:
        return path.rename(new)
    objects = place.objects()
    for one in objects:
        one.copy_to(target.joinpath(*one.relative_to(place).parts))
    for one in sorted(objects, key=lambda one: one.name != "config.json"):
        one.unlink(missing_ok=True)
    return new


def remove_tree(path: Path) -> None:
    """Removes a directory with all that is in it, as far as possible."""
    place = _in_bucket(path)
    if place is None:
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for one in place.objects():
            one.unlink(missing_ok=True)


def create(path: Path, text: str) -> None:
    """Writes a new file; raises FileExistsError if there is one, whoever creates it first."""
    if place := _in_bucket(path):
        place.create(text.encode())
        return
    with path.open("x", encoding="utf-8") as opened:
        opened.write(text)


def touch(path: Path) -> None:
    """Makes now the time of the last change of a file."""
    if is_bucket(path):
        path.write_bytes(path.read_bytes())
    else:
        os.utime(path)


def remove_if(path: Path, text: str) -> bool:
    """Removes a file with this content. False: another process did so, and may have made its own.

    Two processes that both want to remove it never remove what one of them wrote after.
    """
    if place := _in_bucket(path):
        return place.unlink_if(text.encode())
    aside = path.with_name(f"{path.name}-{platform.node()}-{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    if aside.read_text(encoding="utf-8", errors="replace") != text:
        aside.rename(path)
        return False
    aside.unlink()
    return True


def now_at(file: Path) -> float:
    """The time by the clock of the disk or the bucket that a file is on, or is to be written to."""
    if is_bucket(file):
        probe = file.with_name(f"{file.name}-{platform.node()}-{os.getpid()}")
        probe.write_bytes(b"")
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}-") as new:
        return os.stat(new.name).st_mtime


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically: a crash never leaves half of it."""
    if is_bucket(path):  # an object appears when all of it has arrived
        path.write_text(text)
        return
    scratch = _scratch(path)
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _scratch(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def why_not_writable(*files: Path) -> str:
    """Why `write_text` could not write one of these files, on one line; empty if it could.

    To be asked before the work whose result they hold; nothing is left behind.
    """
    for file in files:
        if is_bucket(file):
            try:
                now_at(file)
            except OSError as error:
                return f"{file.parent}: {error.strerror}"
            continue
        for path in (file, _scratch(file)):
            if path.is_dir():
                return f"{path} is a directory"
        there = next(path for path in file.absolute().parents if os.path.lexists(path))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            return f"{there}: {error.strerror}"
    return ""


def cache_directory(kind: str) -> Path | None:
    """Where to keep what can be recomputed: under $GHM_JAX_CACHE, or ~/.cache/ghm_jax.

    None: there is no home directory, as in a container without a user, and nothing is kept.
    """
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("GHM_JAX_CACHE") or Path.home() / ".cache/ghm_jax") / kind
    return None


class GrowingFiles:
    """Where to write the files of a run that grow, such as logs: in its own directory.

    Nothing can be added to an object in a bucket. There they grow in a temporary directory, and
    those that have changed are copied whole, from time to time and at each checkpoint: what a job
    that is killed has logged since is lost, and comes again when it resumes from the checkpoint.
    """

    def __init__(self, directory: Path, every: float = 60.0) -> None:
        """
        Args:
            directory: of the run.
            every: seconds between two copies.
        """
        self._directory, self._every = directory, every
        self.path = directory
        """Where to write them, on a disk."""
        if is_bucket(directory):
            self.path = Path(tempfile.mkdtemp(prefix="ghm-jax-"))
        self._copied: dict[Path, tuple[int, int]] = {}
        self._next = time.monotonic() + every

    def copy_if_due(self) -> None:
        """Copies what has changed if it is time to; raises OSError if that fails."""
        if time.monotonic() >= self._next:
            self.copy()

    def copy(self) -> None:
        """Copies what has changed; raises OSError if that fails."""
        self._next = time.monotonic() + self._every
        if not is_bucket(self._directory):
            return
        for file in sorted(self.path.rglob("*")):
            seen = file.stat()
            version = seen.st_size, seen.st_mtime_ns
            if file.is_file() and self._copied.get(file) != version:
                self._directory.joinpath(*file.relative_to(self.path).parts).write_bytes(
                    file.read_bytes()
                )
                self._copied[file] = version

    def close(self) -> None:
        """Copies what has changed and removes the temporary directory; raises OSError."""
        try:
            self.copy()
        finally:
            if self.path != self._directory:
                shutil.rmtree(self.path, ignore_errors=True)

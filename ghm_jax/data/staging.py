"""Data sets in a bucket: what is needed of them is copied to a local disk, once.

Records can only be read from files. The copies lie in a cache under the names that they have in the
bucket, so that the cache is a directory of data sets as well. A copy is whole or has another name;
`staged.json` beside it says which version of the object it is.
"""

import base64
import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ghm_jax.exceptions import ConfigError
from ghm_jax.json_text import parse_json
from ghm_jax.progress import Progress
from ghm_jax.storage import cache_directory, telling_of_retries, write_text

if TYPE_CHECKING:
    from ghm_jax.bucket import BucketPath, StoredFile

STREAMS = 8
"""Files that are copied at the same time."""
BLOCK = 1 << 25
"""Bytes of a request; a copy that was stopped goes on after the last block."""
_COPIED, _LOCK = "staged.json", "staging.lock"


def local_directory(place: Path, cache: str = "") -> Path:
    """Where on the disk the copy of a directory in a bucket is.

    Args:
        place: gs://BUCKET/DIR.
        cache: `data.cache`; empty: `data` in $GHM_JAX_CACHE, or in ~/.cache/ghm_jax.

    Raises:
        ConfigError: there is no home directory.
    """
    directory = Path(cache) if cache else cache_directory("data")
    if directory is None:
        problem = f"empty, and there is no home directory to copy {place} to"
        raise ConfigError("data.cache", problem, "set it to a directory on a local disk")
    return directory.absolute() / str(place).partition("://")[2]


def stage(place: Path, cache: str, is_needed: Callable[[str], bool], progress: Progress) -> Path:
    """Copies what is needed of a data set in a bucket, as far as it is not there already.

    Processes of one machine share the copies: one copies, the others wait for it.

    Args:
        place: of the data set in the bucket.
        cache: see `local_directory`.
        is_needed: whether the file with this name is.
        progress: receives progress updates.

    Returns:
        The directory of the copies.

    Raises:
        ConfigError: the bucket does not answer, or the disk is too small or cannot be written.
    """
    source, target = cast("BucketPath", place), local_directory(place, cache)
    with _alone(target, progress), _failing(source), telling_of_retries(place, progress.say):
        stored = source.files()
        copied = _copied(target)
        if any(name in copied and copied[name] != file.version for name, file in stored.items()):
            _empty(target)  # prepared again: other shards, and what was cached beside them
            copied = {}
        missing = {
            name: file
            for name, file in stored.items()
            if is_needed(name) and not (name in copied and _size(target / name) == file.size)
        }
        if missing:
            _copy_all(source, target, missing, copied, progress)
    return target


def upload(prepared: Path, place: Path, progress: Progress) -> None:
    """Copies a prepared data set into a bucket, where it appears when it is complete.

    Called again it goes on with what is missing.

    Args:
        prepared: the data set, below `local_directory`, whose files are then its copies.
        place: for it in the bucket.
        progress: receives progress updates.

    Raises:
        ConfigError: the bucket does not answer.
    """
    target = cast("BucketPath", place)
    names = [path.name for path in prepared.iterdir() if path.name not in (_COPIED, _LOCK)]
    names.sort(key=lambda name: (name == "features.json", name))  # last: with it, it is a data set
    with _failing(target), telling_of_retries(place, progress.say):
        there = target.files()
        for done, name in enumerate(names, start=1):
            file = prepared / name
            if name not in there or there[name].md5 != _md5(file):
                (target / name).upload(file)
            progress.update("upload", done, len(names), {"file": name})
        progress.close()
        stored = target.files()
    _note(prepared, {name: stored[name].version for name in names})


def _copy_all(
    source: "BucketPath",
    target: Path,
    files: Mapping[str, "StoredFile"],
    copied: Mapping[str, str],
    progress: Progress,
) -> None:
    """Copies files side by side, and notes each that is complete beside those that were."""
    target.mkdir(parents=True, exist_ok=True)
    parts = {name: _part(target, name, file) for name, file in files.items()}
    there = sum(map(_size, parts.values()))
    total = sum(file.size for file in files.values())
    _check_disk(target, total - there)
    stopped, done = threading.Event(), {}

    def copy(name: str) -> str:
        _copy(source / name, parts[name], files[name], stopped)
        return name

    def moved() -> int:
        """Bytes on the disk."""
        return sum(
            files[name].size if name in done else _size(part) for name, part in parts.items()
        )

    def megabytes(size: int) -> int:
        return -(-size // 10**6)

    pool = ThreadPoolExecutor(STREAMS)
    try:
        pending = {pool.submit(copy, name) for name in files}
        while pending:
            finished, pending = wait(pending, timeout=0.5)
            for name in (future.result() for future in finished):
                parts[name].replace(target / name)
                done[name] = files[name].version
            if finished:
                _note(target, {**copied, **done})
            name = f"copy {source.parent.name} (MB)"
            progress.update(name, megabytes(moved()), megabytes(total), {})
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        progress.close()


def _copy(source: "BucketPath", part: Path, file: "StoredFile", stopped: threading.Event) -> None:
    """Adds to a part of a file what is missing, and checks size and checksum."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as writing:
        while writing.tell() < file.size and not stopped.is_set():
            end = min(writing.tell() + BLOCK, file.size)
            if not writing.write(source.read_bytes(writing.tell(), end)):
                break  # it has become shorter
    if stopped.is_set():
        return
    if part.stat().st_size != file.size or file.md5 not in ("", _md5(part)):
        part.unlink()
        raise ConfigError(
            str(source), "the copy differs from it", "call again; if it stays so, upload it again"
        )


def _part(target: Path, name: str, file: "StoredFile") -> Path:
    """A file that is not complete; that of another version has another name."""
    return target / f"{name}.{file.version}.part"


def _size(file: Path) -> int:
    """In bytes; 0 if it is not there."""
    return file.stat().st_size if file.is_file() else 0


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return base64.b64encode(hashlib.file_digest(opened, "md5").digest()).decode()


def _copied(target: Path) -> dict[str, str]:
    """{name: version} of the files that are complete; if that cannot be read, none is."""
    try:
        found = parse_json((target / _COPIED).read_bytes())
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _note(target: Path, copied: Mapping[str, str]) -> None:
    write_text(target / _COPIED, json.dumps(copied))


def _empty(directory: Path) -> None:
    """Removes all but the lock."""
    for path in directory.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_disk(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise ConfigError(
            "data.cache",
            f"{needed / 1e9:.1f} GB are to be copied to {target}, where {free / 1e9:.1f} GB are "
            "free",
            "free some space, or set it to a directory on a larger disk",
        )


@contextlib.contextmanager
def _alone(target: Path, progress: Progress) -> Iterator[None]:
    """No other process of this machine copies to the directory; the lock ends with a process."""
    import fcntl  # which Windows lacks

    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = (target / _LOCK).open("w")
    except OSError as error:
        problem = f"{target} cannot be written ({error.strerror})"
        remedy = "set it to a directory on a local disk"
        raise ConfigError("data.cache", problem, remedy) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"{target}: another process copies the data, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _failing(place: "BucketPath") -> Iterator[None]:
    """An error of the bucket or the disk becomes one line."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or place)
        problem = f"cannot be copied ({error.strerror or error})"
        remedy = "call again, it goes on where it was"
        raise ConfigError(where, problem, remedy) from error

"""Files and directories: written atomically, moved aside, never overwritten by accident."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

from ghm_jax.exceptions import ArgumentError


def unused_directory(path: str | Path) -> Path:
    """A directory for output that does not exist or is empty, so that nothing is overwritten.

    Raises:
        ArgumentError: it is in use.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError("out", f"{path} is not empty", "choose a new directory")
    return path


def set_aside(path: Path) -> Path:
    """Renames an old run, so that nothing is lost; returns its new path."""
    stem = f"{path.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"
    new, number = path.with_name(stem), 2
    while new.exists():
        new, number = path.with_name(f"{stem}-{number}"), number + 1
    return path.rename(new)


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically: a crash never leaves half of it."""
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

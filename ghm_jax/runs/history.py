"""Records of a run as JSON lines: `metrics.jsonl` and `evaluations.jsonl`."""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ghm_jax.runs.storage import write_text


def read_history(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, by rising step.

    A crash can leave half of a last line; lines that are not a record are skipped. A run that
    resumes from a checkpoint logs some steps again: a record whose step is not after the one before
    it replaces everything from that step on.

    Raises:
        OSError: the file cannot be read.
    """
    history: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        while history and history[-1]["step"] >= record["step"]:
            history.pop()
        history.append(record)
    return history


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to a file of JSON lines, the whole line or nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, 2)
        line = json.dumps(record).encode() + b"\n"
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def rewrite(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of JSON lines."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))

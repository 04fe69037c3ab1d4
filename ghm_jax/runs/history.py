"""Records of a run as JSON lines: `metrics.jsonl` and `evaluations.jsonl`."""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ghm_jax.json_text import parse_json
from ghm_jax.storage import as_path, write_text

_HISTOGRAMS = ("ghm_c", "ghm_r")


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, by rising step.

    A crash can leave half of a last line; lines that are not a record, a `step` and numbers by
    name, are skipped. A run that resumes from a checkpoint logs some steps again: a record whose
    step is not after the one before it replaces everything from that step on.

    Raises:
        OSError: the file cannot be read.
    """
    history: list[dict[str, Any]] = []
    for line in as_path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if not _is_record(record):
            continue
        while history and history[-1]["step"] >= record["step"]:
            history.pop()
        history.append(record)
    return history


def _is_record(value: Any) -> bool:
    """Whether a value of JSON can be read as one that was logged."""
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and 0 <= value["step"] < 2**31
        and all(_is_logged(name, logged) for name, logged in value.items())
    )


def _is_logged(name: str, value: Any) -> bool:
    """Whether a value can be what was logged under a name: a number, a histogram, or None."""
    if value is None or name not in _HISTOGRAMS:
        return value is None or _is_number(value)
    if not isinstance(value, dict):
        return False
    counts, weights = value.get("counts"), value.get("weights")
    if not isinstance(counts, list) or not isinstance(weights, list):
        return False
    return len(counts) == len(weights) > 0 and all(map(_is_number, [*counts, *weights]))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**63


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

"""What the order of training must know of every image before it decodes one: sizes and counts."""

import io
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghm_jax.data.schema import has_area, read_objects
from ghm_jax.data.transforms import encoded_size


class Index(NamedTuple):
    """Facts about the N images of a split, in the order of its records."""

    sizes: np.ndarray
    """i32[N, 2], (height, width) of the stored images; 0 where the header cannot be read."""
    objects: np.ndarray
    """i32[N], objects to learn from: no crowds, no degenerate boxes."""
    crowds: np.ndarray
    """i32[N], crowd regions with an area."""
    degenerate: np.ndarray
    """i32[N], boxes without width or height."""


def read_index(source: Sequence[Mapping[str, Any]], cache: Path | None = None) -> Index:
    """Looks once at every record; images are not decoded, only their headers are read.

    Args:
        source: records of a `Dataset`.
        cache: file to keep the answer in, so that the next run need not look again. It belongs to
            these very records. A directory that cannot be written to is no error.
    """
    if cache is not None and (kept := _load(cache, len(source))) is not None:
        return kept
    rows = np.array([_look(source[i]) for i in range(len(source))], np.int32).reshape(-1, 5)
    index = Index(rows[:, :2], *rows[:, 2:].T)
    if cache is not None:
        _save(cache, index)
    return index


def _look(record: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    try:
        height, width = encoded_size(record["image"])
    except ValueError:
        height, width = 0, 0
    # The size does not matter for what is counted here, only that it is not 0.
    objects = read_objects(record, height or 1, width or 1)
    real = has_area(objects.boxes)
    crowds = real & objects.is_crowd
    return height, width, int((real & ~crowds).sum()), int(crowds.sum()), int((~real).sum())


def _load(cache: Path, length: int) -> Index | None:
    try:
        with np.load(io.BytesIO(cache.read_bytes()), allow_pickle=False) as kept:
            index = Index(*(kept[name] for name in Index._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not there, or half of it: look again
    return index if len(index.sizes) == length else None


def _save(cache: Path, index: Index) -> None:
    """Written beside and renamed, because other hosts may do the same at the same time."""
    try:
        handle, beside = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}-")
    except OSError:
        return
    with os.fdopen(handle, "wb") as file:
        np.savez(file, **index._asdict())
    Path(beside).chmod(0o644)
    Path(beside).replace(cache)

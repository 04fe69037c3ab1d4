"""Sizes and object counts of all images, which the order of training needs before any decoding."""

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghm_jax.data.schema import has_area, read_objects
from ghm_jax.data.transforms import encoded_size


class Index(NamedTuple):
    """Facts about the N images of a split, in the order of its records."""

    sizes: np.ndarray
    """i32[N, 2], (height, width) of the stored images; 0 if the header cannot be read."""
    objects: np.ndarray
    """i32[N], objects to learn from: no crowds, no degenerate boxes."""
    crowds: np.ndarray
    """i32[N], crowd regions with an area."""
    degenerate: np.ndarray
    """i32[N], boxes without width or height."""


def read_index(source: Sequence[Mapping[str, Any]], cache: Path | None = None) -> Index:
    """Reads every record once; of the images only the headers are read, nothing is decoded.

    Args:
        source: records of a `Dataset`.
        cache: file of exactly these records that the index is saved to, so that the next run need
            not read them again. A directory that cannot be written to is not an error.
    """
    if cache is not None and (kept := _load(cache, len(source))) is not None:
        return kept
    rows = np.array([_facts(source[i]) for i in range(len(source))], np.int32).reshape(-1, 5)
    index = Index(rows[:, :2], *rows[:, 2:].T)
    if cache is not None:
        _save(cache, index)
    return index


def _facts(record: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """Height, width, objects, crowds and degenerate boxes of one record."""
    try:
        height, width = encoded_size(record["image"])
    except ValueError:
        height, width = 0, 0
    objects = read_objects(record)
    real = has_area(objects.boxes)
    crowds = real & objects.is_crowd
    return height, width, int((real & ~crowds).sum()), int(crowds.sum()), int((~real).sum())


def _load(cache: Path, length: int) -> Index | None:
    try:
        with np.load(io.BytesIO(cache.read_bytes()), allow_pickle=False) as kept:
            index = Index(*(kept[name] for name in Index._fields))
    except Exception:  # missing or damaged, for which NumPy and zipfile raise a dozen kinds
        return None  # read the records again
    shapes = [(length, 2), (length,), (length,), (length,)]
    fits = [array.shape for array in index] == shapes and all(a.dtype == np.int32 for a in index)
    return index if fits and all((array >= 0).all() for array in index) else None


def _save(cache: Path, index: Index) -> None:
    """Writes a temporary file and renames it, because other hosts may save at the same time."""
    try:
        handle, beside = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}-")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **index._asdict())
        Path(beside).chmod(0o644)
        Path(beside).replace(cache)
    except OSError:  # a full disk, or a directory in its place
        Path(beside).unlink(missing_ok=True)

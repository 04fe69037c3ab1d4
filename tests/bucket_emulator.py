"""The bucket of `experiments.local_bucket`, for tests, which are skipped where it cannot be had."""

from pathlib import Path

import pytest

from ghm_jax.storage import as_path

pytest.importorskip("gcsfs", reason="needs the extra gcs")
pytest.importorskip("gcp_storage_emulator", reason="needs the extra dev")

from experiments.local_bucket import BUCKET, URL, forget_store, running_store

__all__ = ["BUCKET", "URL", "copy_to_bucket", "forget_store", "running_store"]


def copy_to_bucket(directory: Path, place: str) -> str:
    """Copies a directory of data sets to gs://BUCKET/DIR, as a person would; returns that."""
    for file in directory.rglob("*"):
        if file.is_file():
            as_path(f"{place}/{file.relative_to(directory)}").write_bytes(file.read_bytes())
    return place

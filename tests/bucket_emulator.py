"""The bucket of `experiments.local_bucket`, for tests, which are skipped where it cannot be had."""

import pytest

pytest.importorskip("gcsfs", reason="needs the extra gcs")
pytest.importorskip("gcp_storage_emulator", reason="needs the extra dev")

from experiments.local_bucket import BUCKET, URL, forget_store, running_store

__all__ = ["BUCKET", "URL", "forget_store", "running_store"]

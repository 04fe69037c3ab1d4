"""Checks a bucket: whether a run could be kept there, and how fast it is."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghm_jax.analysis.doctor.finding import Finding

_BYTES = 1_000_000


def examine_bucket(place: Path) -> Iterator[Finding]:
    """Writes an object at a place in a bucket, reads it back and deletes it."""
    file = place / f"doctor-{platform.node()}-{os.getpid()}"
    data = os.urandom(_BYTES)
    said, doing = [], "written"
    try:
        said.append(_timed("written", lambda: file.write_bytes(data))[0])
        doing = "read"
        took, found = _timed("read", file.read_bytes)
        said.append(took)
        doing = "deleted"
        said.append(_timed("deleted", file.unlink)[0])
    except OSError as error:
        remedy = "grant the account of this machine Storage Object Admin on the bucket"
        if not isinstance(error, PermissionError):
            remedy = "check the network and the state of the bucket"
        problem = f"{place}: an object cannot be {doing} ({error.strerror})"
        yield Finding("bucket", False, problem, remedy)
        return
    if found != data:
        problem = f"{place}: an object is not what was written"
        yield Finding("bucket", False, problem, "use another bucket")
        return
    yield Finding("bucket", True, f"{place}: {_BYTES / 1e6:.0f} MB {', '.join(said)}")


def _timed(what: str, do: Callable[[], Any]) -> tuple[str, Any]:
    start = time.perf_counter()
    result = do()
    return f"{what} in {time.perf_counter() - start:.2f} s", result

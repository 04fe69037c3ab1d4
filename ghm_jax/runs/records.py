"""Measurements with what is needed to interpret them: command, date, machine and versions."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ghm_jax.storage import write_text


def write_record(
    path: str | Path,
    command: str,
    contents: Mapping[str, Any],
    *,
    packages: Sequence[str] = (),
    device: str | None = None,
) -> None:
    """Writes measurements as JSON.

    Args:
        path: file to write.
        command: what produces the measurements.
        contents: the measurements by name.
        packages: whose versions matter; those that are not installed are omitted.
        device: what was measured on; None: JAX's first device.
    """
    record = {**provenance(command, packages, device), **contents}
    write_text(Path(path), json.dumps(record, indent=2) + "\n")


def provenance(
    command: str, packages: Sequence[str] = (), device: str | None = None
) -> dict[str, Any]:
    """What `write_record` adds to measurements; its arguments."""
    return {
        "command": command.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": _first_device() if device is None else device,
        "load_average": round(os.getloadavg()[0], 1),  # over one minute: other work on the machine
        "versions": {"python": platform.python_version(), **_versions(packages)},
    }


def _first_device() -> str:
    device = jax.devices()[0]
    return f"{device.platform} {device.device_kind}, {os.cpu_count()} cores"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found

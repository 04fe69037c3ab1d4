"""Commands that measure."""

import contextlib
import dataclasses
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ghm_jax.cli.arguments import parse
from ghm_jax.config import ConfigError


@dataclass
class BenchLosses:
    """Times the losses, value and gradient, on one image's logits (9 anchors, 80 classes)."""

    sizes: tuple[tuple[int, int], ...] = ((640, 640), (800, 1344))
    """(height, width) of the images."""
    repeats: int = 7
    """Timed calls of each loss."""
    out: str = ""
    """JSON file to write the rows into."""


def losses_command(args: list[str]) -> None:
    """`ghm-jax bench losses`."""
    from ghm_jax.bench.losses import measure_losses

    a = parse(BenchLosses, args, "ghm-jax bench losses")
    rows = measure_losses(a.sizes, a.repeats)
    print(
        f"{'image':>10}  {'value and gradient of':<36}{'ms':>9}{'x focal':>9}{'extra memory':>14}"
    )
    for row in rows:
        height, width = row.image_size
        memory = "-" if row.extra_memory is None else f"{row.extra_memory:.1f} x logits"
        print(
            f"{f'{height} x {width}':>10}  {row.loss:<36}{row.milliseconds:>9.1f}"
            f"{row.to_focal:>9.2f}{memory:>14}"
        )
    if a.out:
        rows = [dataclasses.asdict(row) for row in rows]
        _write_result(Path(a.out), "losses", args, {"rows": rows}, "jax")


@dataclass
class BenchData:
    """Times the input pipeline, stage by stage, in processor time an image."""

    source: tuple[int, int] = (480, 640)
    """Height and width of the stored JPEGs."""
    repeats: int = 7
    """Timed rounds over all stages."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes to time the loader with, by the clock."""
    batches: int = 20
    """Batches of 8 images the loader is timed over."""
    out: str = ""
    """JSON file to write the rows into."""


_DATA_PACKAGES = ("grain", "opencv-python-headless", "tensorflow", "tensorflow-cpu")


def data_command(args: list[str]) -> None:
    """`ghm-jax bench data`."""
    from ghm_jax.bench.data import measure_data, measure_loader

    a = parse(BenchData, args, "ghm-jax bench data")
    for name, value in (("repeats", a.repeats), ("batches", a.batches), ("source", min(a.source))):
        if value < 1:
            raise ConfigError(f"--{name}: must be positive, got {value}")
    rows = measure_data(a.source, a.repeats)
    print(f"{'':<44}{'ms of a core':>14}{'images/s/core':>15}{'of the limit':>14}")
    for row in rows:
        print(
            f"{row.stage:<44}{row.milliseconds:>14.2f}{row.images_per_second:>15.0f}"
            f"{row.of_limit:>14.0%}"
        )
    loader = measure_loader(a.workers, a.source, a.batches)
    print(f"\n{'loader, by the clock':<44}{'':>14}{'images/s':>15}")
    for row in loader:
        print(f"{f'{row.workers} workers':<58}{row.images_per_second:>15.0f}")
    if a.out:
        parts = {"rows": rows, "loader": loader}
        tables = {key: [dataclasses.asdict(row) for row in part] for key, part in parts.items()}
        _write_result(Path(a.out), "data", args, tables, *_DATA_PACKAGES)


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _write_result(
    path: Path, what: str, args: list[str], tables: dict[str, Any], *packages: str
) -> None:
    """Measured tables with what is needed to read them, the versions of `packages` too."""
    import jax

    device = jax.devices()[0]
    record = {
        "command": "ghm-jax bench " + " ".join([what, *args]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{device.platform} {device.device_kind}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),  # of a minute: what else the machine did
        "versions": {"python": platform.python_version()} | _versions(*packages),
        **tables,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")

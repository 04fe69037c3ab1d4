"""Commands that measure."""

import dataclasses
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghm_jax.cli.arguments import parse


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
        _write_result(Path(a.out), args, [dataclasses.asdict(row) for row in rows])


def _write_result(path: Path, args: list[str], rows: list[dict[str, Any]]) -> None:
    """A measured table with what is needed to read it."""
    import jax

    device = jax.devices()[0]
    record = {
        "command": "ghm-jax bench " + " ".join(["losses", *args]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{device.platform} {device.device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")

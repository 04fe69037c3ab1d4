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
from typing import Any, Literal

from ghm_jax.cli.arguments import Arguments, parse
from ghm_jax.exceptions import ConfigError


@dataclass
class BenchLosses:
    """Times the losses, value and gradient, on one image's logits (9 anchors, 80 classes)."""

    sizes: tuple[tuple[int, int], ...] = ((640, 640), (800, 1344))
    """(height, width) of the images."""
    repeats: int = 7
    """Timed calls of each loss."""
    out: str = ""
    """JSON file to write the rows into."""


def losses_command(arguments: Arguments) -> None:
    """`ghm-jax bench losses`."""
    from ghm_jax.bench.losses import measure_losses

    a = parse(BenchLosses, arguments, "ghm-jax bench losses")
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
        _write_result(Path(a.out), "losses", arguments.words, {"rows": rows}, "jax")


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


def data_command(arguments: Arguments) -> None:
    """`ghm-jax bench data`."""
    from ghm_jax.bench.data import measure_data, measure_loader

    a = parse(BenchData, arguments, "ghm-jax bench data")
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
        _write_result(Path(a.out), "data", arguments.words, tables, *_DATA_PACKAGES)


@dataclass
class BenchTrain:
    """Times training steps on random batches: networks and their parts, GHM-C against focal loss,
    1 to 8 devices (virtual ones on CPU), and how time grows with pixels, images and classes."""

    parts: tuple[Literal["networks", "losses", "devices", "image", "batch", "classes"], ...] = (
        *("networks", "losses", "devices", "image", "batch", "classes"),
    )
    """What to compare."""
    backbones: tuple[str, ...] = ("resnet18", "resnet50", "resnet101")
    """Of the networks; all other comparisons use the first."""
    size: tuple[int, int] | None = None
    """Height and width of the images (800 1344; on CPU 96 96)."""
    batch_size: int = 8
    """Images a step, over all devices."""
    channels: int | None = None
    """Of pyramid and heads (256; on CPU 64)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the activations (bfloat16; on CPU float32)."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; those that the machine has and that divide the batch are used."""
    repeats: int = 5
    """Timed steps of each."""
    out: str = ""
    """JSON file to write the rows into."""


_SIZES = {"image": "pixels of an image", "batch": "images", "classes": "classes"}


def train_command(arguments: Arguments) -> None:
    """`ghm-jax bench train`."""
    import jax

    from ghm_jax.bench.train import Case, growth, measure_train

    a = parse(BenchTrain, arguments, "ghm-jax bench train")
    with contextlib.suppress(RuntimeError):  # JAX runs already: its devices are what they are
        jax.config.update("jax_num_cpu_devices", max(a.devices, default=1))
    cpu = jax.devices()[0].platform == "cpu"
    base = Case(
        backbone=a.backbones[0] if a.backbones else "",
        image_size=a.size or ((96, 96) if cpu else (800, 1344)),
        batch_size=a.batch_size,
        channels=a.channels or (64 if cpu else 256),
        dtype=a.dtype or ("float32" if cpu else "bfloat16"),
    )
    if min(a.repeats, *a.devices) < 1:
        raise ConfigError("--repeats, --devices: must be positive")
    for backbone in a.backbones or ("",):
        dataclasses.replace(base, backbone=backbone).config.check()
    print(
        f"{jax.devices()[0].device_kind}, {base.dtype}, pyramid of {base.channels} channels; "
        "medians; x: to the first of the group, CPU: of processor time; MFU: "
        + ("of a matrix product here" if cpu else "of the published peak")
    )
    print(
        f"{'':<9}{'step of':<44}{'ms':>9}{'x':>7}{'CPU':>7}{'images/s':>10}"
        f"{'TFLOP/s':>9}{'MFU':>6}{'MiB':>8}"
    )
    rows = []
    for row in measure_train(
        base,
        parts=a.parts,
        backbones=a.backbones,
        device_counts=a.devices,
        repeats=a.repeats,
    ):
        rows.append(row)
        case = row.case
        height, width = case.image_size
        what = f"{case.backbone} {case.classification} {case.batch_size} x {height} x {width}"
        what += f" {case.num_classes} classes" if row.part == "classes" else ""
        what += f" on {case.devices}" if row.part == "devices" else ""
        what += "" if case.collectives else ", nothing added up"
        mfu = "-" if row.mfu is None else f"{row.mfu:.0%}"
        processor = "-" if row.processor_ratio is None else f"{row.processor_ratio:.2f}"
        memory = "-" if row.memory is None else f"{row.memory / 2**20:.0f}"
        print(
            f"{row.part:<9}{what:<44}{row.milliseconds:>9.1f}{row.ratio:>7.2f}{processor:>7}"
            f"{row.images_per_second:>10.1f}{row.teraflops:>9.3f}{mfu:>6}{memory:>8}",
            flush=True,
        )
        if row.split:
            print(f"{'':<11}{', '.join(f'{k} {v:.1f}' for k, v in row.split.items())} ms")
        if row.part == "losses" and row.ratio != 1:
            low, high = row.ratio_quartiles
            text = f"{row.ratio:.3f} of {rows[-2].case.classification}'s time, half of the rounds "
            text += f"from {low:.3f} to {high:.3f}"
            if row.processor_ratio is not None:
                text += f"; {row.processor_ratio:.3f} of its processor time"
            print(f"{'':<11}{text}")
    slopes = growth(rows)
    for part, slope in slopes.items():
        print(f"time grows as the {_SIZES[part]} to the power of {slope:.2f}")
    if a.out:
        tables = {"rows": [dataclasses.asdict(row) for row in rows], "growth": slopes}
        _write_result(Path(a.out), "train", arguments.words, tables, "jax", "jaxlib", "flax")


@dataclass
class BenchInference:
    """Times inference, from images to detections: all of it, the network, and the suppression, with
    few scores above the threshold and with all of them; torchvision's RetinaNet where installed."""

    backbone: str = "resnet50"
    """Of the network."""
    size: tuple[int, int] = (800, 1344)
    """Height and width of the images."""
    batch_size: int | None = None
    """Images a call (8; on CPU 2)."""
    channels: int = 256
    """Of pyramid and heads."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the activations (bfloat16; on CPU float32)."""
    repeats: int = 5
    """Timed calls of each."""
    out: str = ""
    """JSON file to write the rows into."""


def inference_command(arguments: Arguments) -> None:
    """`ghm-jax bench inference`."""
    a = parse(BenchInference, arguments, "ghm-jax bench inference")
    if min(a.repeats, 1 if a.batch_size is None else a.batch_size) < 1:
        raise ConfigError("--repeats, --batch-size: must be positive")
    from ghm_jax.distributed.devices import choose_devices, use_cpu_cores

    use_cpu_cores((a.batch_size or 2,))
    devices = choose_devices(0)
    cpu = devices[0].platform == "cpu"
    batch_size = a.batch_size or (2 if cpu else 8)
    devices = devices[: max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)]

    from ghm_jax.bench.inference import Case, measure_inference

    case = Case(
        backbone=a.backbone,
        image_size=a.size,
        batch_size=batch_size,
        channels=a.channels,
        dtype=a.dtype or ("float32" if cpu else "bfloat16"),
    )
    case.config.check(len(devices))
    print(
        f"{case.backbone}, {case.batch_size} images of {a.size[0]} x {a.size[1]} a call, "
        f"{case.dtype}, on {len(devices)} x {devices[0].device_kind}; medians"
    )
    rows = measure_inference(case, devices, a.repeats)
    print(
        f"{'':<32}{'scores':<8}{'candidates':>11}{'found':>7}{'ms':>9}{'images/s':>10}"
        f"{'network':>9}{'selection':>11}{'share':>8}"
    )
    for row in rows:
        parts = f"{'-':>9}{'-':>11}{'-':>8}"
        if row.share is not None:
            parts = f"{row.network:>9.0f}{row.selection:>11.1f}{row.share:>8.1%}"
        print(
            f"{row.detector:<32}{row.scores:<8}{row.candidates:>11}{row.detections:>7.0f}"
            f"{row.milliseconds:>9.0f}{row.images_per_second:>10.2f}{parts}"
        )
    if a.out:
        tables = {
            "case": dataclasses.asdict(case) | {"devices": len(devices)},
            "rows": [dataclasses.asdict(row) | {"share": row.share} for row in rows],
        }
        packages = ("jax", "jaxlib", "flax", "torch", "torchvision")
        _write_result(Path(a.out), "inference", arguments.words, tables, *packages)


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

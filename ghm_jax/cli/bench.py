"""Commands that measure time and memory."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ghm_jax.cli.arguments import Arguments, check_out, parse
from ghm_jax.exceptions import ArgumentError

if TYPE_CHECKING:
    from ghm_jax.bench.train import StepTime


@dataclass
class BenchLosses:
    """Times the losses, value and gradient, on the logits of one image (9 anchors, 80 classes)."""

    sizes: tuple[tuple[int, int], ...] = ((640, 640), (800, 1344))
    """(height, width) of the images."""
    repeats: int = 7
    """Timed calls of each loss."""
    out: str = ""
    """JSON file to write the rows into."""


def losses_command(arguments: Arguments) -> None:
    """`ghm-jax bench losses`."""
    from ghm_jax.bench.losses import measure_losses
    from ghm_jax.distributed.devices import choose_devices
    from ghm_jax.runs.records import write_record

    a = parse(BenchLosses, arguments, "ghm-jax bench losses")
    check_out(a.out)
    choose_devices(0)  # raises where there is none
    measured = measure_losses(a.sizes, a.repeats)
    print(
        f"{'image':>10}  {'value and gradient of':<36}{'ms':>9}{'x focal':>9}{'extra memory':>14}"
    )
    for loss in measured:
        height, width = loss.padded_size
        memory = "-" if loss.extra_memory is None else f"{loss.extra_memory:.1f} x logits"
        print(
            f"{f'{height} x {width}':>10}  {loss.loss:<36}{loss.milliseconds:>9.1f}"
            f"{loss.to_focal:>9.2f}{memory:>14}"
        )
    if a.out:
        contents = {"rows": _asdicts(measured)}
        write_record(a.out, _command("losses", arguments.words), contents, packages=("jax",))


@dataclass
class BenchData:
    """Times the input pipeline, stage by stage, in CPU time per image."""

    source: tuple[int, int] = (480, 640)
    """Height and width of the stored JPEGs."""
    repeats: int = 7
    """Timed rounds over all stages."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes to time the loader with."""
    batches: int = 20
    """Batches of 8 images to time the loader over."""
    out: str = ""
    """JSON file to write the rows into."""


_DATA_PACKAGES = ("grain", "opencv-python-headless", "tensorflow", "tensorflow-cpu")


def data_command(arguments: Arguments) -> None:
    """`ghm-jax bench data`."""
    from ghm_jax.bench.data import measure_data, measure_loader
    from ghm_jax.runs.records import write_record

    a = parse(BenchData, arguments, "ghm-jax bench data")
    check_out(a.out)
    for name, value in (("repeats", a.repeats), ("batches", a.batches), ("source", min(a.source))):
        if value < 1:
            raise ArgumentError(name, f"must be positive, got {value}")
    stages = measure_data(a.source, a.repeats)
    print(f"{'':<44}{'CPU-ms/image':>14}{'images/s/core':>15}{'of the limit':>14}")
    for stage in stages:
        print(
            f"{stage.stage:<44}{stage.milliseconds:>14.2f}{stage.images_per_second:>15.0f}"
            f"{stage.of_limit:>14.0%}"
        )
    rates = measure_loader(a.workers, a.source, a.batches)
    print(f"\n{'loader, wall time':<44}{'':>14}{'images/s':>15}")
    for rate in rates:
        print(f"{f'{rate.workers} workers':<58}{rate.images_per_second:>15.0f}")
    if a.out:
        contents = {"rows": _asdicts(stages), "loader": _asdicts(rates)}
        write_record(a.out, _command("data", arguments.words), contents, packages=_DATA_PACKAGES)


@dataclass
class BenchTrain:
    """Times training steps on random batches: networks and the stages of their step, GHM-C against
    focal loss, 1 to 8 devices (virtual ones on CPU), and how time grows with pixels, images and
    classes."""

    parts: tuple[Literal["networks", "losses", "devices", "image", "batch", "classes"], ...] = (
        *("networks", "losses", "devices", "image", "batch", "classes"),
    )
    """What to compare."""
    backbones: tuple[str, ...] = ("resnet18", "resnet50", "resnet101")
    """Networks to compare; all other comparisons use the first."""
    size: tuple[int, int] | None = None
    """Height and width of the images (800 1344; on CPU 96 96)."""
    batch_size: int = 8
    """Images per step, over all devices."""
    channels: int | None = None
    """Of pyramid and heads (256; on CPU 64)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the activations (bfloat16; on CPU float32)."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; those that are available and divide the batch size are used."""
    repeats: int = 5
    """Timed steps of each case."""
    out: str = ""
    """JSON file to write the rows into."""


_SIZES = {"image": "pixels per image", "batch": "images", "classes": "classes"}


def train_command(arguments: Arguments) -> None:
    """`ghm-jax bench train`."""
    import jax

    from ghm_jax.bench.train import TrainCase, growth, measure_train
    from ghm_jax.distributed.devices import choose_devices
    from ghm_jax.runs.records import write_record

    a = parse(BenchTrain, arguments, "ghm-jax bench train")
    check_out(a.out)
    for name, value in (("repeats", a.repeats), ("devices", min(a.devices, default=1))):
        if value < 1:
            raise ArgumentError(name, f"must be positive, got {value}")
    with contextlib.suppress(RuntimeError):  # JAX is already initialized, with the devices it has
        jax.config.update("jax_num_cpu_devices", max(a.devices, default=1))
    device = choose_devices(0)[0]
    cpu = device.platform == "cpu"
    base = TrainCase(
        backbone=a.backbones[0] if a.backbones else "",
        padded_size=a.size or ((96, 96) if cpu else (800, 1344)),
        batch_size=a.batch_size,
        channels=a.channels or (64 if cpu else 256),
        dtype=a.dtype or ("float32" if cpu else "bfloat16"),
    )
    for backbone in a.backbones or ("",):
        dataclasses.replace(base, backbone=backbone).config.check()
    print(
        f"{device.device_kind}, {base.dtype}, pyramid of {base.channels} channels; "
        "medians; x: relative to the first of the group, CPU: the same for CPU time; MFU: "
        + ("relative to a matrix product here" if cpu else "relative to the published peak")
    )
    print(
        f"{'':<9}{'step of':<44}{'ms':>9}{'x':>7}{'CPU':>7}{'images/s':>10}"
        f"{'TFLOP/s':>9}{'MFU':>6}{'MiB':>8}"
    )
    measured = []
    for step in measure_train(
        base,
        comparisons=a.parts,
        backbones=a.backbones,
        device_counts=a.devices,
        repeats=a.repeats,
    ):
        _print_step(step, reference=measured[-1] if measured else step)
        measured.append(step)
    slopes = growth(measured)
    for comparison, slope in slopes.items():
        print(f"time grows as the {_SIZES[comparison]} to the power of {slope:.2f}")
    if a.out:
        contents = {"rows": _asdicts(measured), "growth": slopes}
        packages = ("jax", "jaxlib", "flax")
        write_record(a.out, _command("train", arguments.words), contents, packages=packages)


def _print_step(step: "StepTime", reference: "StepTime") -> None:
    """A line of the table, and more about networks and losses; `reference` is the step before."""
    case = step.case
    height, width = case.padded_size
    what = f"{case.backbone} {case.classification} {case.batch_size} x {height} x {width}"
    what += f" {case.num_classes} classes" if step.comparison == "classes" else ""
    what += f" on {case.devices}" if step.comparison == "devices" else ""
    what += "" if case.collectives else ", no sums"
    mfu = "-" if step.mfu is None else f"{step.mfu:.0%}"
    processor = "-" if step.processor_ratio is None else f"{step.processor_ratio:.2f}"
    memory = "-" if step.memory is None else f"{step.memory / 2**20:.0f}"
    print(
        f"{step.comparison:<9}{what:<44}{step.milliseconds:>9.1f}{step.ratio:>7.2f}{processor:>7}"
        f"{step.images_per_second:>10.1f}{step.teraflops:>9.3f}{mfu:>6}{memory:>8}",
        flush=True,
    )
    if step.split:
        print(f"{'':<11}{', '.join(f'{k} {v:.1f}' for k, v in step.split.items())} ms")
    if step.comparison == "losses" and step.ratio != 1:
        low, high = step.ratio_quartiles
        text = f"{step.ratio:.3f} times as long as {reference.case.classification}, "
        text += f"quartiles {low:.3f} and {high:.3f}"
        if step.processor_ratio is not None:
            text += f"; {step.processor_ratio:.3f} times the CPU time"
        print(f"{'':<11}{text}")


@dataclass
class BenchInference:
    """Times inference from images to detections: end to end, the network, and the NMS, with few and
    with all scores above the threshold; also torchvision's RetinaNet where it is installed."""

    backbone: str = "resnet50"
    """Of the network."""
    size: tuple[int, int] = (800, 1344)
    """Height and width of the images."""
    batch_size: int | None = None
    """Images per call (8; on CPU 2)."""
    channels: int = 256
    """Of pyramid and heads."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the activations (bfloat16; on CPU float32)."""
    repeats: int = 5
    """Timed calls of each detector."""
    out: str = ""
    """JSON file to write the rows into."""


def inference_command(arguments: Arguments) -> None:
    """`ghm-jax bench inference`."""
    a = parse(BenchInference, arguments, "ghm-jax bench inference")
    check_out(a.out)
    for name, value in (("repeats", a.repeats), ("batch_size", a.batch_size)):
        if value is not None and value < 1:
            raise ArgumentError(name, f"must be positive, got {value}")
    from ghm_jax.distributed.devices import choose_devices, use_cpu_cores

    use_cpu_cores((a.batch_size or 2,))
    devices = choose_devices(0)
    cpu = devices[0].platform == "cpu"
    batch_size = a.batch_size or (2 if cpu else 8)
    devices = devices[: max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)]

    from ghm_jax.bench.inference import InferenceCase, measure_inference
    from ghm_jax.runs.records import write_record

    case = InferenceCase(
        backbone=a.backbone,
        padded_size=a.size,
        batch_size=batch_size,
        channels=a.channels,
        dtype=a.dtype or ("float32" if cpu else "bfloat16"),
    )
    case.config.check(len(devices))
    print(
        f"{case.backbone}, {case.batch_size} images of {a.size[0]} x {a.size[1]} per call, "
        f"{case.dtype}, on {len(devices)} x {devices[0].device_kind}; medians"
    )
    measured = measure_inference(case, devices, a.repeats)
    print(
        f"{'':<32}{'scores':<8}{'candidates':>11}{'found':>7}{'ms':>9}{'images/s':>10}"
        f"{'network':>9}{'selection':>11}{'share':>8}"
    )
    for each in measured:
        stages = f"{'-':>9}{'-':>11}{'-':>8}"
        if each.share is not None:
            stages = f"{each.network:>9.0f}{each.selection:>11.1f}{each.share:>8.1%}"
        print(
            f"{each.detector:<32}{each.scores:<8}{each.candidates:>11}{each.detections:>7.0f}"
            f"{each.milliseconds:>9.0f}{each.images_per_second:>10.2f}{stages}"
        )
    if a.out:
        rows = zip(_asdicts(measured), measured, strict=True)
        contents = {
            "case": _asdicts([case])[0] | {"devices": len(devices)},
            "rows": [row | {"share": each.share} for row, each in rows],
        }
        packages = ("jax", "jaxlib", "flax", "torch", "torchvision")
        write_record(a.out, _command("inference", arguments.words), contents, packages=packages)


def _command(what: str, args: Sequence[str]) -> str:
    return " ".join(["ghm-jax bench", what, *args])


# Names in experiments/results/ of the fields that are called otherwise here.
_KEYS = {"padded_size": "image_size", "comparison": "part"}


def _asdicts(measured: Sequence[Any]) -> list[dict[str, Any]]:
    """Dataclasses as they stand in experiments/results/."""

    def renamed(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {_KEYS.get(key, key): value for key, value in items}

    return [dataclasses.asdict(each, dict_factory=renamed) for each in measured]

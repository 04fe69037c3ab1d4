"""Time of a training step: by network, part, loss, number of devices, and size of the problem.

Batches are random and lie in memory: how long a run waits for its data is `ghm-jax bench data`'s.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ghm_jax.anchors import level_sizes
from ghm_jax.config import Config, Data, Loss, Model, Optimizer
from ghm_jax.describe import describe, peak_flops
from ghm_jax.detection_loss import detection_loss
from ghm_jax.parallel import REPLICA, parallelize, split_batch
from ghm_jax.schedule import make_optimizer
from ghm_jax.step import TrainState, init_state, loss_inputs, make_model, make_targets, train_step

PARTS = ("networks", "losses", "devices", "image", "batch", "classes")
"""What can be compared; of the last three the growth of the time is given as well."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step to time."""

    backbone: str = "resnet18"
    image_size: tuple[int, int] = (128, 128)
    """(height, width) in pixels, multiples of 32."""
    batch_size: int = 8
    """Images, over all devices."""
    num_classes: int = 80
    classification: Literal["ghm_c", "focal"] = "ghm_c"
    """GHM-R for the boxes in both."""
    devices: int = 1
    collectives: bool = True
    """False: every device for itself, as a measure of what adding up costs."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    channels: int = 256
    """Of pyramid and heads."""

    @property
    def config(self) -> Config:
        """What `ghm-jax train` would be given; nothing is frozen."""
        return Config(
            data=Data(
                short_side=min(self.image_size),
                long_side=max(self.image_size),
                buckets=(self.image_size,),
            ),
            model=Model(backbone=self.backbone, channels=self.channels, dtype=self.dtype),
            loss=Loss(classification=self.classification),
            optimizer=Optimizer(batch_size=self.batch_size),
        )


@dataclass(frozen=True)
class Row:
    """A step in a comparison."""

    part: str
    """One of `PARTS`."""
    case: Case
    milliseconds: float
    """Median over the repeats, which go round all cases of the part."""
    fastest: float
    """Fewest milliseconds of a repeat."""
    ratio: float
    """Time over that of the part's first case in the same round, median over the rounds."""
    images_per_second: float
    teraflops: float
    """Model operations a second: three times those of the forward pass, two a multiply-add."""
    mfu: float | None
    """Share of the devices' published peak; None: not known, or not in bfloat16."""
    memory: int | None
    """Bytes that the step needs on a device, as XLA plans it; None: not known."""
    split: dict[str, float] | None
    """Networks on one device: milliseconds of forward, loss (matching, value, gradient), optimizer
    and host (a batch to the device), each timed alone, and backward, what is left of the step."""


def measure_train(
    base: Case,
    *,
    parts: Sequence[str] = PARTS,
    backbones: Sequence[str] = ("resnet18", "resnet50", "resnet101"),
    device_counts: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 5,
) -> list[Row]:
    """Times training steps, one difference to `base` at a time.

    Args:
        base: on one device.
        parts: which of `PARTS`.
        backbones: of the networks.
        device_counts: those there are and that divide the batch are used.
        repeats: timed rounds, after one that compiles.
    """
    prepare = functools.cache(_prepare)  # a case in several comparisons is compiled once
    rows = []
    for part, cases in _comparisons(base, backbones, device_counts).items():
        if part not in parts:
            continue
        calls = [prepare(case) for case in cases]
        times = _rounds([call.run for call in calls], repeats)
        for case, call, of_case in zip(cases, calls, times, strict=True):
            split = None
            if part == "networks":
                split = _split(case, repeats, float(np.median(of_case)))
            rows.append(_row(part, case, of_case, times[0], call.memory, split))
    return rows


def growth(rows: list[Row]) -> dict[str, float]:
    """Slopes of log time over log pixels, images and classes: 1 is proportional, 0 is free."""
    size_of: dict[str, Callable[[Case], int]] = {
        "image": lambda case: case.image_size[0] * case.image_size[1],
        "batch": lambda case: case.batch_size,
        "classes": lambda case: case.num_classes,
    }
    slopes = {}
    for part, size in size_of.items():
        of_part = [row for row in rows if row.part == part]
        x = np.log([size(row.case) for row in of_part])
        if len(set(x.tolist())) > 1:
            slopes[part] = float(np.polyfit(x, np.log([r.milliseconds for r in of_part]), 1)[0])
    return slopes


def _comparisons(
    base: Case, backbones: Sequence[str], device_counts: Sequence[int]
) -> dict[str, list[Case]]:
    height, width = base.image_size
    half = max(32, height // 64 * 32), max(32, width // 64 * 32)
    counts = [n for n in device_counts if n <= jax.device_count() and base.batch_size % n == 0]
    across = [replace(base, devices=n) for n in counts]
    if counts and counts[-1] > 1:
        across.append(replace(across[-1], collectives=False))
    return {
        "networks": [replace(base, backbone=name) for name in backbones],
        "losses": [replace(base, classification=name) for name in ("focal", "ghm_c")],
        "devices": across,
        "image": [
            replace(base, image_size=size) for size in (half, (half[0], width), base.image_size)
        ],
        "batch": [
            replace(base, batch_size=n)
            for n in sorted({max(1, base.batch_size // k) for k in (4, 2, 1)})
        ],
        "classes": [replace(base, num_classes=n) for n in (20, 80, 320)],
    }


@dataclass(frozen=True)
class _Call:
    run: Callable[[], Any]
    memory: int | None


def _prepare(case: Case) -> _Call:
    """A compiled step that goes on from where its last call ended, as in training."""
    config, devices = case.config, jax.devices()[: case.devices]
    axis_name = REPLICA if case.collectives else None
    model, optimizer = make_model(config, case.num_classes, axis_name), make_optimizer(config)
    step = functools.partial(
        train_step, config=config, model=model, optimizer=optimizer, axis_name=axis_name
    )
    replicated: Any = parallelize(step, devices, config.run.wrapper, donate=True)
    batch = split_batch(random_batch(case), case.devices)
    state = _first_state(config, model, optimizer)
    compiled = replicated.lower(state, batch).compile()
    # The batch is on the devices before a step begins: what its way there costs is in the split.
    batch = jax.device_put(batch, compiled.input_shardings[0][1])
    held = [jax.device_put(state, compiled.input_shardings[0][0])]
    plan = compiled.memory_analysis()

    def run() -> None:
        held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return _Call(run, _planned_bytes(plan))


def _first_state(config: Config, model: Any, optimizer: Any) -> TrainState:
    # As in training: initializers run once, so XLA's CPU compiler need not optimize them.
    cpu = jax.devices()[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if cpu else None
    initialize = functools.partial(init_state, config, model, optimizer)
    return jax.jit(initialize, compiler_options=options)()


def _planned_bytes(plan: Any) -> int | None:
    if plan is None:
        return None
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return kept + plan.temp_size_in_bytes


def random_batch(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise with seven boxes an image, a little more than COCO has on average."""
    rng = np.random.default_rng(seed)
    (height, width), images, most, count = case.image_size, case.batch_size, 100, 7
    corners = rng.uniform(0, 0.7, (images, count, 2))
    sides = rng.uniform(0.05, 0.3, (images, count, 2))
    boxes = np.zeros((images, most, 4), np.float32)
    scale = np.array([width, height, width, height])
    boxes[:, :count] = np.concatenate([corners, corners + sides], -1) * scale
    labels = np.full((images, most), -1, np.int32)
    labels[:, :count] = rng.integers(0, case.num_classes, (images, count))
    return {
        "images": rng.integers(0, 256, (images, height, width, 3), np.uint8),
        "boxes": boxes,
        "labels": labels,
        "image_size": np.full((images, 2), case.image_size, np.int32),
        "image_id": np.arange(images, dtype=np.int32),
    }


def _split(case: Case, repeats: int, step: float) -> dict[str, float]:
    """Milliseconds of the parts of a step on one device."""
    config = case.config
    model, optimizer = make_model(config, case.num_classes), make_optimizer(config)
    state = _first_state(config, model, optimizer)
    host_batch = random_batch(case)
    batch = jax.device_put(host_batch)
    variables = state.variables
    sizes = level_sizes(case.image_size, model.anchors_per_cell)

    @jax.jit
    def forward(variables: Any, batch: Any) -> Any:
        return loss_inputs(variables, batch, config=config, model=model)[:2]

    @jax.jit
    def loss(outputs: Any, batch: Any) -> Any:
        targets = make_targets(batch, config)

        def total(outputs: Any) -> tuple[jax.Array, Any]:
            logits, deltas = outputs
            parts, *rest = detection_loss(
                logits, deltas, targets, state.ghm, config=config, level_sizes=sizes
            )
            return parts.total, rest

        return jax.value_and_grad(total, has_aux=True)(outputs)

    @jax.jit
    def update(state: Any) -> Any:  # any gradient does
        updates, opt_state = optimizer.update(state.params, state.opt_state, state.params)
        return jax.tree.map(jnp.add, state.params, updates), opt_state

    outputs = forward(variables, batch)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: jax.block_until_ready(forward(variables, batch)),
        "loss": lambda: jax.block_until_ready(loss(outputs, batch)),
        "optimizer": lambda: jax.block_until_ready(update(state)),
        "host": lambda: jax.block_until_ready(jax.device_put(split_batch(host_batch, 1))),
    }
    times = _rounds(list(calls.values()), repeats)
    split = {name: float(np.median(of)) for name, of in zip(calls, times, strict=True)}
    split["backward"] = step - split["forward"] - split["loss"] - split["optimizer"]
    return split


def _rounds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of each call in each round; one round before them is not timed."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 1):
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if i > 0:
                of_call.append(1e3 * (time.perf_counter() - start))
    return times


def _row(
    part: str,
    case: Case,
    times: list[float],
    first: list[float],
    memory: int | None,
    split: dict[str, float] | None,
) -> Row:
    milliseconds = float(np.median(times))
    cost = describe(case.config, case.num_classes, case.image_size).total.multiply_adds
    flops = 6 * cost * case.batch_size / (1e-3 * milliseconds)
    peak = peak_flops(jax.devices()[0].device_kind)
    return Row(
        part=part,
        case=case,
        milliseconds=milliseconds,
        fastest=min(times),
        ratio=float(np.median(np.divide(times, first))),
        images_per_second=case.batch_size / (1e-3 * milliseconds),
        teraflops=flops / 1e12,
        mfu=flops / (peak * case.devices) if peak and case.dtype == "bfloat16" else None,
        memory=memory,
        split=split,
    )

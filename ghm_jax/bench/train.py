"""Time of a training step: by network, part, loss, number of devices, and size of the problem.

Batches are random and lie in memory: how long a run waits for its data is `ghm-jax bench data`'s.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ghm_jax.analysis.cost import peak_flops, training_operations
from ghm_jax.batch import NO_CLASS, Batch, GroundTruth
from ghm_jax.bench.case import DetectorCase
from ghm_jax.config import Config, Loss, Optimizer
from ghm_jax.detection.anchors import level_sizes
from ghm_jax.detection.loss import detection_loss
from ghm_jax.detection.outputs import loss_inputs, make_targets
from ghm_jax.distributed.devices import REPLICA, jit_init, parallelize, split_batch
from ghm_jax.training.build import build
from ghm_jax.training.state import TrainState

PARTS = ("networks", "losses", "devices", "image", "batch", "classes")
"""What can be compared; of the last three the growth of the time is given as well."""


@dataclass(frozen=True, kw_only=True)
class Case(DetectorCase):
    """A training step to time."""

    backbone: str = "resnet18"
    image_size: tuple[int, int] = (128, 128)
    batch_size: int = 8
    """Images, over all devices."""
    classification: Literal["ghm_c", "focal"] = "ghm_c"
    """GHM-R for the boxes in both."""
    devices: int = 1
    collectives: bool = True
    """False: every device for itself, as a measure of what adding up costs."""

    @property
    def config(self) -> Config:
        """What `ghm-jax train` would be given; nothing is frozen."""
        return self.config_with(
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
    """Time over that of the part's first case in the same round, median over the rounds ..."""
    ratio_quartiles: tuple[float, float]
    """... and the quartiles, between which half of the rounds lie."""
    processor_ratio: float | None
    """The same of the processor time, which other work on the machine disturbs less; None: not on
    CPU."""
    images_per_second: float
    teraflops: float
    """Operations of the convolutions a second, in 10^12, see `describe.training_operations`."""
    mfu: float | None
    """Share of the peak: of the published one in bfloat16, of `matrix_peak` on CPU. None: not
    known."""
    memory: int | None
    """Bytes that the step needs on a device, as XLA plans it; None: not known."""
    split: dict[str, float] | None
    """Networks on one device: milliseconds of forward, loss (matching, value, gradient), optimizer
    and transfer (a batch to the device), each timed alone; backward, what is left of the step; and
    dispatch, until the call of a step returns, which is host overhead where the devices are ahead
    of it and on CPU part of the step."""


def measure_train(
    base: Case,
    *,
    parts: Sequence[str] = PARTS,
    backbones: Sequence[str] = ("resnet18", "resnet50", "resnet101"),
    device_counts: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 5,
) -> Iterator[Row]:
    """Times training steps, one difference to `base` at a time. Rows come as they are measured.

    Args:
        base: on one device.
        parts: which of `PARTS`.
        backbones: of the networks.
        device_counts: those there are and that divide the batch are used.
        repeats: timed rounds, after one that is not timed; of the losses, whose difference is
            small, five times as many.
    """
    # A state and a program of several comparisons are made once.
    first_state = functools.cache(_first_state)
    prepare = functools.cache(functools.partial(_prepare, first_state))
    peak = _peak(base)
    for part, cases in _comparisons(base, backbones, device_counts).items():
        if part not in parts:
            continue
        calls = [prepare(case) for case in cases]
        rounds = 5 * repeats if part == "losses" else repeats
        times, processor = _rounds([call.run for call in calls], rounds)
        ratios, processor_ratios = times / times[0], processor / processor[0]
        for i, (case, call) in enumerate(zip(cases, calls, strict=True)):
            split = None
            if part == "networks":
                state = first_state(case.config, case.num_classes)
                split = _split(case, state, repeats, float(np.median(times[i])))
                split["dispatch"] = float(np.median(call.dispatches[-repeats:]))
            row = _row(part, case, times[i], ratios[i], call.memory, split, peak)
            if jax.devices()[0].platform == "cpu":
                row = replace(row, processor_ratio=float(np.median(processor_ratios[i])))
            yield row


def matrix_peak(size: int = 1536, repeats: int = 5) -> float:
    """Operations a second of the fastest of some products of float32 matrices on all CPU cores."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    times, _ = _rounds([lambda: jax.block_until_ready(product(x, x))], repeats)
    return 2 * size**3 / (1e-3 * float(times.min()))


def _peak(base: Case) -> Callable[[int], float | None]:
    """Operations a second of a number of devices."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        cores = matrix_peak() if base.dtype == "float32" else None
        return lambda devices: cores  # CPU devices share the cores
    peak = peak_flops(device.device_kind) if base.dtype == "bfloat16" else None
    return lambda devices: peak and peak * devices


def growth(rows: Sequence[Row]) -> dict[str, float]:
    """Slopes of log time over log pixels, images and classes: 1 is proportional, 0 is free.

    Of ratios to the first case in the same round, on CPU of processor time.
    """
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
            ratios = [r.ratio if r.processor_ratio is None else r.processor_ratio for r in of_part]
            slopes[part] = float(np.polyfit(x, np.log(ratios), 1)[0])
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
    dispatches: list[float]
    """Milliseconds until a call of the step returned, of each run."""


def _prepare(first_state: Callable[[Config, int], TrainState], case: Case) -> _Call:
    """A compiled step that goes on from where its last call ended, as in training."""
    config, devices = case.config, jax.devices()[: case.devices]
    axis_name = REPLICA if case.collectives else None
    trainer = build(config, case.num_classes, axis_name)
    replicated: Any = parallelize(trainer.step, devices, config.run.wrapper, donate=True)
    batch = split_batch(random_batch(case), case.devices)
    state = first_state(config, case.num_classes)
    compiled = replicated.lower(state, batch).compile()
    # The batch is on the devices before a step begins: what its way there costs is in the split.
    batch = jax.device_put(batch, compiled.input_shardings[0][1])
    held = [jax.device_put(state, compiled.input_shardings[0][0])]
    plan = compiled.memory_analysis()
    dispatches = []

    def run() -> None:
        start = time.perf_counter()
        held[0], metrics = compiled(held[0], batch)
        dispatches.append(1e3 * (time.perf_counter() - start))
        jax.block_until_ready((held[0], metrics))

    return _Call(run, _planned_bytes(plan), dispatches)


def _first_state(config: Config, num_classes: int) -> TrainState:
    """On the host, as steps take the memory of the state that they are given."""
    trainer = build(config, num_classes)
    return jax.device_get(jit_init(trainer.init_state, jax.devices()[0])())


def _planned_bytes(plan: Any) -> int | None:
    if plan is None:
        return None
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return kept + plan.temp_size_in_bytes


def random_batch(case: Case, seed: int = 0) -> Batch:
    """Noise with seven boxes an image, a little more than COCO has on average."""
    rng = np.random.default_rng(seed)
    (height, width), images, most, count = case.image_size, case.batch_size, 100, 7
    corners = rng.uniform(0, 0.7, (images, count, 2))
    sides = rng.uniform(0.05, 0.3, (images, count, 2))
    boxes = np.zeros((images, most, 4), np.float32)
    scale = np.array([width, height, width, height])
    boxes[:, :count] = np.concatenate([corners, corners + sides], -1) * scale
    labels = np.full((images, most), NO_CLASS, np.int32)
    labels[:, :count] = rng.integers(0, case.num_classes, (images, count))
    return Batch(
        images=rng.integers(0, 256, (images, height, width, 3), np.uint8),
        image_size=np.full((images, 2), case.image_size, np.int32),
        image_id=np.arange(images, dtype=np.int32),
        truth=GroundTruth(boxes, labels, np.zeros((images, most), bool)),
    )


def _split(case: Case, state: TrainState, repeats: int, step: float) -> dict[str, float]:
    """Milliseconds of the parts of a step on one device."""
    config = case.config
    trainer = build(config, case.num_classes)
    model, optimizer = trainer.model, trainer.optimizer
    state = jax.device_put(state)
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
        "transfer": lambda: jax.block_until_ready(jax.device_put(split_batch(host_batch, 1))),
    }
    times, _ = _rounds(list(calls.values()), repeats)
    split = {name: float(np.median(of)) for name, of in zip(calls, times, strict=True)}
    split["backward"] = step - split["forward"] - split["loss"] - split["optimizer"]
    return split


def _rounds(calls: Sequence[Callable[[], Any]], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds [calls, repeats] by the clock and of processor time (all threads).

    A round is all calls, every other one from the last to the first; one before them does not
    count.
    """
    times = np.zeros((2, len(calls), repeats + 1))
    for i in range(repeats + 1):
        order = range(len(calls)) if i % 2 else reversed(range(len(calls)))
        for j in order:
            start, processor = time.perf_counter(), time.process_time()
            calls[j]()
            times[0, j, i] = 1e3 * (time.perf_counter() - start)
            times[1, j, i] = 1e3 * (time.process_time() - processor)
    return times[0, :, 1:], times[1, :, 1:]


def _row(
    part: str,
    case: Case,
    times: np.ndarray,
    ratios: np.ndarray,
    memory: int | None,
    split: dict[str, float] | None,
    peak: Callable[[int], float | None],
) -> Row:
    milliseconds = float(np.median(times))
    operations = training_operations(case.config, case.num_classes, case.image_size)
    flops = operations * case.batch_size / (1e-3 * milliseconds)
    at_most = peak(case.devices)
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return Row(
        part=part,
        case=case,
        milliseconds=milliseconds,
        fastest=float(times.min()),
        ratio=ratio,
        ratio_quartiles=(low, high),
        processor_ratio=None,
        images_per_second=case.batch_size / (1e-3 * milliseconds),
        teraflops=flops / 1e12,
        mfu=flops / at_most if at_most else None,
        memory=memory,
        split=split,
    )

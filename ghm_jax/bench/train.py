"""Time of a training step by network, loss, number of devices, and size of the problem.

Batches are random and stay in memory; `ghm-jax bench data` times the input pipeline.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ghm_jax.analysis.chips import peak_flops
from ghm_jax.analysis.cost import training_operations
from ghm_jax.batch import NO_CLASS, Batch, GroundTruth
from ghm_jax.bench.case import DetectorCase
from ghm_jax.bench.noise import BOXES, make_noise
from ghm_jax.bench.timing import time_rounds
from ghm_jax.config import Config, Loss, Optimizer
from ghm_jax.detection.loss import detection_loss
from ghm_jax.detection.outputs import make_targets, network_outputs
from ghm_jax.distributed.devices import REPLICA, jit_init, parallelize, split_batch
from ghm_jax.training.build import build
from ghm_jax.training.state import TrainState

COMPARISONS = ("networks", "losses", "devices", "image", "batch", "classes")
"""What can be compared; `growth` is that of the last three."""


@dataclass(frozen=True, kw_only=True)
class TrainCase(DetectorCase):
    """A training step to time."""

    backbone: str = "resnet18"
    padded_size: tuple[int, int] = (128, 128)
    batch_size: int = 8
    """Images per step, over all devices."""
    classification: Literal["ghm_c", "focal"] = "ghm_c"
    """The box loss is GHM-R in both cases."""
    devices: int = 1
    collectives: bool = True
    """False: no sums over devices, to measure what they cost."""

    @property
    def config(self) -> Config:
        """The config of such a run; nothing is frozen."""
        return self.config_with(
            loss=Loss(classification=self.classification),
            optimizer=Optimizer(batch_size=self.batch_size),
        )


@dataclass(frozen=True)
class StepTime:
    """Time of a training step in a comparison."""

    comparison: str
    """One of `COMPARISONS`."""
    case: TrainCase
    milliseconds: float
    """Median over the repeats."""
    fastest: float
    """Milliseconds of the fastest repeat."""
    ratio: float
    """Time relative to the comparison's first case in the same round, median over the rounds ..."""
    ratio_quartiles: tuple[float, float]
    """... and its quartiles."""
    processor_ratio: float | None
    """The same for CPU time, which other work on the machine affects less; None: not on CPU."""
    images_per_second: float
    teraflops: float
    """10^12 operations of the convolutions per second, see `cost.training_operations`."""
    mfu: float | None
    """Share of the peak: the published one for bfloat16, `matrix_peak` on CPU. None: unknown."""
    memory: int | None
    """Bytes that the step needs on a device, as planned by XLA; None: unknown."""
    split: dict[str, float] | None
    """Networks on one device: milliseconds of forward, loss (matching, value, gradient), optimizer
    and transfer (a batch to the device), each timed alone; backward, the rest of the step; and
    dispatch, until the call of a step returns: host overhead on accelerators, part of the step on
    CPU."""


def measure_train(
    base: TrainCase,
    *,
    comparisons: Sequence[str] = COMPARISONS,
    backbones: Sequence[str] = ("resnet18", "resnet50", "resnet101"),
    device_counts: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 5,
) -> Iterator[StepTime]:
    """Times training steps that differ from `base` in one respect; yields them as they are done.

    Args:
        base: on one device.
        comparisons: which of `COMPARISONS`.
        backbones: for the comparison of networks.
        device_counts: those that are available and divide the batch size are used.
        repeats: timed rounds, after one that warms up; five times as many for the losses, whose
            difference is small.
    """
    # States and programs that several comparisons share are made once.
    first_state = functools.cache(_first_state)
    prepare = functools.cache(functools.partial(prepare_step, first_state=first_state))
    peak = _peak(base)
    for comparison, cases in _cases(base, backbones, device_counts).items():
        if comparison not in comparisons:
            continue
        calls = [prepare(case) for case in cases]
        rounds = 5 * repeats if comparison == "losses" else repeats
        times, cpu_times = time_rounds([call.run for call in calls], rounds)
        ratios, processor_ratios = times / times[0], cpu_times / cpu_times[0]
        for i, (case, call) in enumerate(zip(cases, calls, strict=True)):
            split = None
            if comparison == "networks":
                state = first_state(case.config, case.num_classes)
                split = _split(case, state, repeats, float(np.median(times[i])))
                split["dispatch"] = float(np.median(call.dispatches[-repeats:]))
            measured = _step_time(comparison, case, times[i], ratios[i], call.memory, split, peak)
            if jax.devices()[0].platform == "cpu":
                measured = replace(measured, processor_ratio=float(np.median(processor_ratios[i])))
            yield measured


def matrix_peak(size: int = 1536, repeats: int = 5) -> float:
    """Operations per second of a float32 matrix product on all CPU cores, the fastest of some."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    times, _ = time_rounds([lambda: jax.block_until_ready(product(x, x))], repeats)
    return 2 * size**3 / (1e-3 * float(times.min()))


def _peak(base: TrainCase) -> Callable[[int], float | None]:
    """Peak operations per second as a function of the number of devices."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        cores = matrix_peak() if base.dtype == "float32" else None
        return lambda devices: cores  # CPU devices share the cores
    peak = peak_flops(device.device_kind) if base.dtype == "bfloat16" else None
    return lambda devices: peak and peak * devices


def growth(measured: Sequence[StepTime]) -> dict[str, float]:
    """Slopes of log time over log pixels, images and classes: 1 is proportional, 0 is constant.

    Times are relative to the first case in the same round; CPU time on CPU.
    """
    size_of: dict[str, Callable[[TrainCase], int]] = {
        "image": lambda case: case.padded_size[0] * case.padded_size[1],
        "batch": lambda case: case.batch_size,
        "classes": lambda case: case.num_classes,
    }
    slopes = {}
    for comparison, size in size_of.items():
        steps = [step for step in measured if step.comparison == comparison]
        x = np.log([size(step.case) for step in steps])
        if len(set(x.tolist())) > 1:
            ratios = [s.ratio if s.processor_ratio is None else s.processor_ratio for s in steps]
            slopes[comparison] = float(np.polyfit(x, np.log(ratios), 1)[0])
    return slopes


def _cases(
    base: TrainCase, backbones: Sequence[str], device_counts: Sequence[int]
) -> dict[str, list[TrainCase]]:
    """The cases of each comparison."""
    height, width = base.padded_size
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
            replace(base, padded_size=size) for size in (half, (half[0], width), base.padded_size)
        ],
        "batch": [
            replace(base, batch_size=n)
            for n in sorted({max(1, base.batch_size // k) for k in (4, 2, 1)})
        ],
        "classes": [replace(base, num_classes=n) for n in (20, 80, 320)],
    }


@dataclass(frozen=True)
class PreparedStep:
    """A compiled step on random images that continues from the state of its last call, as in
    training."""

    run: Callable[[], Any]
    """One step; waits for its end."""
    memory: int | None
    """As in `StepTime`."""
    dispatches: list[float]
    """Milliseconds until the call of the step returned, for each run."""


def prepare_step(
    case: TrainCase, *, first_state: Callable[[Config, int], TrainState] | None = None
) -> PreparedStep:
    """Compiles the step of a case and puts its batch on the devices.

    Args:
        case: what to time.
        first_state: from config and number of classes to the state before the first step, if
            several cases share it.
    """
    config, devices = case.config, jax.devices()[: case.devices]
    axis_name = REPLICA if case.collectives else None
    trainer = build(config, case.num_classes, axis_name)
    replicated: Any = parallelize(trainer.step, devices, config.run.wrapper, donate=True)
    batch = split_batch(random_batch(case), case.devices)
    state = (first_state or _first_state)(config, case.num_classes)
    compiled = replicated.lower(state, batch).compile()
    # The batch is on the devices before the step starts; the transfer is timed in the split.
    batch = jax.device_put(batch, compiled.input_shardings[0][1])
    held = [jax.device_put(state, compiled.input_shardings[0][0])]
    plan = compiled.memory_analysis()
    dispatches = []

    def run() -> None:
        start = time.perf_counter()
        held[0], metrics = compiled(held[0], batch)
        dispatches.append(1e3 * (time.perf_counter() - start))
        jax.block_until_ready((held[0], metrics))

    return PreparedStep(run, _planned_bytes(plan), dispatches)


def _first_state(config: Config, num_classes: int) -> TrainState:
    """On the host, because steps donate the memory of their input state."""
    trainer = build(config, num_classes)
    return jax.device_get(jit_init(trainer.init_state, jax.devices()[0])())


def _planned_bytes(plan: Any) -> int | None:
    if plan is None:
        return None
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return kept + plan.temp_size_in_bytes


def random_batch(case: TrainCase, seed: int = 0) -> Batch:
    """Noise (`make_noise`), with the boxes padded to 100 rows."""
    images, most = case.batch_size, 100
    noise = make_noise(images, case.padded_size, case.num_classes, seed)
    boxes = np.zeros((images, most, 4), np.float32)
    boxes[:, :BOXES] = noise.boxes
    labels = np.full((images, most), NO_CLASS, np.int32)
    labels[:, :BOXES] = noise.labels
    return Batch(
        images=noise.images,
        image_size=np.full((images, 2), case.padded_size, np.int32),
        image_id=np.arange(images, dtype=np.int32),
        truth=GroundTruth(boxes, labels, np.zeros((images, most), bool)),
    )


def _split(case: TrainCase, state: TrainState, repeats: int, step: float) -> dict[str, float]:
    """Milliseconds of the stages of a step on one device, see `StepTime.split`."""
    config = case.config
    trainer = build(config, case.num_classes)
    model, optimizer = trainer.model, trainer.optimizer
    state = jax.device_put(state)
    host_batch = random_batch(case)
    batch = jax.device_put(host_batch)
    variables = state.variables

    @jax.jit
    def forward(variables: Any, batch: Batch) -> Any:
        return network_outputs(variables, batch.model_inputs(), model=model)

    @jax.jit
    def loss(outputs: Any, batch: Any) -> Any:
        targets = make_targets(batch, config)

        def total(outputs: Any) -> tuple[jax.Array, Any]:
            logits, deltas = outputs
            terms, *rest = detection_loss(logits, deltas, targets, state.ghm, config=config)
            return terms.total, rest

        return jax.value_and_grad(total, has_aux=True)(outputs)

    @jax.jit
    def update(state: Any) -> Any:  # any gradient will do
        updates, opt_state = optimizer.update(state.params, state.opt_state, state.params)
        return jax.tree.map(jnp.add, state.params, updates), opt_state

    outputs = forward(variables, batch)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: jax.block_until_ready(forward(variables, batch)),
        "loss": lambda: jax.block_until_ready(loss(outputs, batch)),
        "optimizer": lambda: jax.block_until_ready(update(state)),
        "transfer": lambda: jax.block_until_ready(jax.device_put(split_batch(host_batch, 1))),
    }
    times, _ = time_rounds(list(calls.values()), repeats)
    split = {name: float(np.median(of)) for name, of in zip(calls, times, strict=True)}
    split["backward"] = step - split["forward"] - split["loss"] - split["optimizer"]
    return split


def _step_time(
    comparison: str,
    case: TrainCase,
    times: np.ndarray,
    ratios: np.ndarray,
    memory: int | None,
    split: dict[str, float] | None,
    peak: Callable[[int], float | None],
) -> StepTime:
    milliseconds = float(np.median(times))
    operations = training_operations(case.config, case.num_classes, case.padded_size)
    flops = operations * case.batch_size / (1e-3 * milliseconds)
    at_most = peak(case.devices)
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return StepTime(
        comparison=comparison,
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

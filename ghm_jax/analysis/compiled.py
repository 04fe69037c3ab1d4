"""What a program of the detector needs on a TPU slice, found by compiling it without the TPU.

The compiler comes with the package `libtpu` and runs on any x86-64 Linux machine. Memory, bytes,
operations and collectives are those of the program that a pod would run; times are lower bounds
from published limits of the chip, not measurements.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from ghm_jax.analysis.chips import TPUS, Chip
from ghm_jax.analysis.hlo import COLLECTIVES, Cost, parse
from ghm_jax.config import Config
from ghm_jax.data.batching import collate, filler_example
from ghm_jax.detection.outputs import predict_step
from ghm_jax.distributed.devices import REPLICA, Device, parallelize
from ghm_jax.exceptions import ArgumentError
from ghm_jax.training.build import build

PARTS = (
    *("normalize", "backbone", "fpn", "class_head", "box_head", "matching"),
    *("classification_loss", "box_loss", "gradients", "optimizer", "decoding", "suppression"),
)
"""Parts of a step, by the names of their scopes; everything else is "other"."""

# libtpu looks for the machine that it runs on, and warns at length when there is none.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
"""To be set before `find_slice`, which loads libtpu."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A TPU slice to compile for."""

    name: str
    """As in "v5e:4x4"."""
    chip: Chip
    devices: Sequence[Device]
    """One per chip."""

    @property
    def hosts(self) -> int:
        """Number of machines that the chips belong to."""
        return len({device.process_index for device in self.devices})


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory of one chip, in bytes."""

    arguments: int
    outputs: int
    """Beyond those that reuse the memory of the arguments."""
    temporaries: int
    code: int
    chip: int
    """What there is."""
    largest_batch: int
    """Images per chip that would fit, estimated from this program: state and code are taken as
    fixed, all else as proportional to the images. 0: not even one."""

    @property
    def peak(self) -> int:
        """What the step takes."""
        return self.arguments + self.outputs + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.peak <= self.chip


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """What a part of the step costs on one chip."""

    bytes: int
    """Read from and written to main memory."""
    flops: int
    """Of convolutions and matrix products."""
    seconds: float
    """Lower bound from both."""
    copies: int
    """Instructions that only give an array another layout or axis order in main memory."""
    copied: int
    """Of the bytes, those of the copies."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Communication between the chips of a slice; one or several in a step."""

    kind: str
    """As in "all-reduce"."""
    scope: str
    """Part of the step that it comes from."""
    count: int
    bytes: int
    """Of the arrays on one chip, all together."""


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A compiled step of a slice; bytes and FLOPs are per chip."""

    topology: str
    chips: int
    hosts: int
    program: Literal["train", "predict"]
    wrapper: str
    padded_size: tuple[int, int]
    batch_per_chip: int
    memory: Memory
    parts: dict[str, PartCost]
    collectives: list[Collective]
    compiler_flops: float
    """As counted by the compiler, with element-wise operations."""
    seconds: dict[str, float]
    """Lower bounds of the step: compute, memory, links."""
    compile_seconds: float

    @property
    def bound(self) -> float:
        """Seconds per step at least, if compute, memory and links overlapped perfectly."""
        return max(self.seconds.values())

    @property
    def total(self) -> PartCost:
        """All parts together."""
        size, flops, copies, copied = (
            sum(getattr(part, name) for part in self.parts.values())
            for name in ("bytes", "flops", "copies", "copied")
        )
        return PartCost(bytes=size, flops=flops, seconds=self.bound, copies=copies, copied=copied)

    def as_record(self) -> dict[str, Any]:
        """All figures by name, for JSON."""
        derived = {"peak": self.memory.peak, "fits": self.memory.fits}
        derived |= {"bound": self.bound, "copies": self.total.copies}
        return {**dataclasses.asdict(self), **derived}


def find_slice(topology: str) -> Slice:
    """The slice of a name such as "v5e:4x4" or "v4:2x2x2".

    Raises:
        ArgumentError: an unknown name, or no compiler here.
    """
    examples = "such as v5e:2x2, v5e:4x4, v4:2x2x4, v5p:2x2x1 or v6e:2x4"
    kind, _, shape = topology.partition(":")
    chip = next((chip for chip in TPUS if chip.name == kind), None)
    if chip is None or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ArgumentError("topology", f"{topology!r} is no TPU slice", f"give one {examples}")
    if not importlib.util.find_spec("libtpu"):
        raise ArgumentError(
            "topology",
            "needs libtpu, the compiler for TPUs, which is not installed",
            'run pip install "jax[tpu]" on x86-64 Linux; no TPU is needed',
        )
    from jax.experimental import topologies

    # Two cores of a chip are one device, as on a real machine; one chip is not a whole host.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:  # of the runtime, for shapes that do not exist
        reason = (str(error).splitlines() or [""])[0]
        raise ArgumentError("topology", f"{topology}: {reason}", f"give one {examples}") from error
    return Slice(name=topology, chip=chip, devices=devices)


def compile_for(
    config: Config,
    num_classes: int,
    padded_size: tuple[int, int],
    target: Slice,
    *,
    program: Literal["train", "predict"] = "train",
    batch_per_chip: int,
) -> CompiledStep:
    """Compiles the step of a config for all chips of a slice and reads what it costs.

    Takes minutes on a few CPU cores for a ResNet-50 at full size.

    Args:
        config: network, losses, optimizer and `run.wrapper`.
        num_classes: of the data set.
        padded_size: (height, width) of the padded images in pixels.
        target: see `find_slice`.
        program: the training step, or the step of evaluation and prediction.
        batch_per_chip: images.

    Raises:
        ArgumentError: the program cannot be compiled, for example because it does not fit.
    """
    step, state, batch = _program(config, num_classes, padded_size, target, program, batch_per_chip)
    start = time.perf_counter()
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ArgumentError(
            "topology", f"the compiler refuses the step: {reason}", "try a smaller `batch_per_chip`"
        ) from error
    seconds = time.perf_counter() - start
    costs, chip = list(parse(compiled.as_text()).costs()), target.chip
    collectives = _collectives(costs)
    return CompiledStep(
        topology=target.name,
        chips=len(target.devices),
        hosts=target.hosts,
        program=program,
        wrapper=config.run.wrapper,
        padded_size=padded_size,
        batch_per_chip=batch_per_chip,
        memory=_memory(compiled.memory_analysis(), _bytes(state), batch_per_chip, chip),
        parts=_parts(costs, chip),
        collectives=collectives,
        compiler_flops=float((compiled.cost_analysis() or {}).get("flops", math.nan)),
        seconds={
            "compute": sum(cost.flops for cost in costs) / chip.flops,
            "memory": sum(cost.bytes for cost in costs) / chip.bandwidth,
            "links": _link_seconds(collectives, len(target.devices), chip),
        },
        compile_seconds=seconds,
    )


def _memory(analysis: Any, state: int, images: int, chip: Chip) -> Memory:
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    fixed = state + analysis.generated_code_size_in_bytes
    growing = analysis.argument_size_in_bytes - state + outputs + analysis.temp_size_in_bytes
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=outputs,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        chip=int(chip.memory),
        largest_batch=max(0, int((chip.memory - fixed) / max(growing / images, 1))),
    )


def _program(
    config: Config,
    num_classes: int,
    padded_size: tuple[int, int],
    target: Slice,
    program: Literal["train", "predict"],
    batch_per_chip: int,
) -> tuple[Any, Any, Any]:
    """The step as `ghm-jax train` or `evaluate` runs it, and the shapes of its arguments."""
    devices = list(target.devices)
    images = collate([filler_example()], padded_size, config.data.max_boxes).batch
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(devices), batch_per_chip, *x.shape[1:]), x.dtype),
        images,
    )
    if program == "predict":
        trainer = build(config, num_classes)
        state = trainer.abstract_state.variables
        step: Callable[..., Any] = functools.partial(
            predict_step, config=config, model=trainer.model
        )
        wrapped = parallelize(step, devices, config.run.wrapper, split_output=True)
        return wrapped, state, batch.model_inputs()
    trainer = build(config, num_classes, REPLICA)
    wrapped = parallelize(trainer.step, devices, config.run.wrapper, donate=True)
    return wrapped, trainer.abstract_state, batch


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def part_of(scope: str) -> str:
    """The part of the step that a scope, as in "jit(f)/jvp(RetinaNet)/fpn/add", belongs to."""
    return next((name for name in re.split(r"[/()]", scope) if name in PARTS), "other")


def _parts(costs: Iterable[Cost], chip: Chip) -> dict[str, PartCost]:
    traffic, flops, copies, copied = (Counter[str]() for _ in range(4))
    for cost in costs:
        part = part_of(cost.scope)
        traffic[part] += cost.bytes
        flops[part] += cost.flops
        if cost.instruction.opcode in ("copy", "transpose"):
            copies[part] += cost.times
            copied[part] += cost.bytes
    return {
        part: PartCost(
            bytes=traffic[part],
            flops=flops[part],
            seconds=max(traffic[part] / chip.bandwidth, flops[part] / chip.flops),
            copies=copies[part],
            copied=copied[part],
        )
        for part in (*PARTS, "other")
        if traffic[part] or flops[part]
    }


def _collectives(costs: Iterable[Cost]) -> list[Collective]:
    count, size = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for cost in costs:
        kind = cost.instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            key = kind, part_of(cost.scope)
            count[key] += cost.times
            size[key] += cost.times * sum(array.bytes for array in cost.instruction.results)
    return [
        Collective(kind=kind, scope=scope, count=count[kind, scope], bytes=size[kind, scope])
        for kind, scope in sorted(count)
    ]


def _link_seconds(collectives: Iterable[Collective], chips: int, chip: Chip) -> float:
    """A sum over n chips sends and receives at least 2 (n - 1) / n of its bytes on each of them;
    other collectives are taken for half of that."""
    share = (chips - 1) / chips
    return sum(
        (2 if c.kind == "all-reduce" else 1) * share * c.bytes / chip.link for c in collectives
    )

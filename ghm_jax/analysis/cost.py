"""What a detector costs: parameters, multiply-adds, anchors. Nothing is computed or compiled."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ghm_jax.config import Config
from ghm_jax.detection.anchors import level_sizes
from ghm_jax.models import RetinaNet
from ghm_jax.training.build import make_model
from ghm_jax.training.optimizer import frozen_parameters

PARTS = ("backbone", "fpn", "class_head", "box_head")
"""Of the network, by their names among its parameters."""

_A100 = 312e12
# Part of a device's name in JAX -> operations a second in bfloat16 with float32 sums, dense. The
# first that fits counts. NVIDIA: the data sheets "H100 Tensor Core GPU" (with sparsity, twice as
# much: SXM 1,979, NVL 1,671, PCIe 1,513), "H200 Tensor Core GPU" (SXM 1,979, NVL 1,671), "A100
# Tensor Core GPU" (312 dense), "L4 Tensor Core GPU" (242 with sparsity) and "T4" (65 in float16, as
# it has no bfloat16). Google: the pages "TPU v4", "v5e", "v5p" and "v6e" of the Cloud TPU
# documentation, for a chip.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("A100", _A100),
    ("L4", 121e12),
    ("T4", 65e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),  # v5p as JAX calls it
    ("TPU v6", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak operations a second of a device by its `device_kind` in JAX; None: not known."""
    words = f"{device_kind} ".replace("-", " ")
    return next((peak for name, peak in _PEAKS if f"{name} " in words), None)


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """A part of the network, or all of it."""

    parameters: int
    """Trained or not; without the stored statistics of batch normalization."""
    trained: int
    """Of these, what training changes."""
    multiply_adds: int
    """Of the convolutions, forwards, for one image."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Costs of a detector for one image of a size."""

    image_size: tuple[int, int]
    """(height, width) in pixels."""
    num_classes: int
    parts: dict[str, PartCost]
    """By the names of `PARTS`."""
    total: PartCost
    xla_flops: float
    """Floating-point operations of the total as XLA counts them before it optimizes: two for each
    multiply-add but none for products with padding, and one for each element of all else. NaN
    where XLA does not count for the device."""
    anchors: int
    """In one image."""
    examples: int
    """(anchor, class) pairs of one image, what the classification loss weighs."""
    parameter_bytes: int
    """What the parameters take; gradients and momentum take as much again each."""


def describe(config: Config, num_classes: int, image_size: tuple[int, int]) -> Description:
    """Counts what the network of a config has and does.

    Multiply-adds are those of the convolutions, products with the zeros that pad an image among
    them, as published figures count. XLA's count of the same network is there for comparison.

    Args:
        config: uses model and anchors.
        num_classes: classes of the data set.
        image_size: (height, width) of the padded image in pixels.
    """
    # In bfloat16 XLA counts every conversion as an operation, though none costs one.
    model = make_model(config, num_classes).clone(dtype=jnp.float32)
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    params = variables["params"]
    frozen: Any = frozen_parameters(params, config.model.frozen_stages)

    features, *backbone = _cost(_backbone, model, variables, image)
    levels, *fpn = _cost(_fpn, model, variables, features)
    _, *class_head = _cost(_class_head, model, variables, levels)
    _, *box_head = _cost(_box_head, model, variables, levels)
    costs = dict(zip(PARTS, (backbone, fpn, class_head, box_head), strict=True))

    parts = {}
    for name, (multiply_adds, _) in costs.items():
        sizes = [leaf.size for leaf in jax.tree.leaves(params[name])]
        stands = jax.tree.leaves(frozen[name])
        trained = sum(size for size, still in zip(sizes, stands, strict=True) if not still)
        parts[name] = PartCost(
            parameters=sum(sizes), trained=trained, multiply_adds=int(multiply_adds)
        )
    anchors = sum(level_sizes(image_size, model.anchors_per_cell))
    return Description(
        image_size=image_size,
        num_classes=num_classes,
        parts=parts,
        total=PartCost(
            parameters=sum(part.parameters for part in parts.values()),
            trained=sum(part.trained for part in parts.values()),
            multiply_adds=sum(part.multiply_adds for part in parts.values()),
        ),
        xla_flops=sum(xla_flops for _, xla_flops in costs.values()),
        anchors=anchors,
        examples=anchors * num_classes,
        parameter_bytes=sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params)),
    )


def training_operations(config: Config, num_classes: int, image_size: tuple[int, int]) -> int:
    """Operations of the convolutions in a training step, for one image: two a multiply-add.

    Forwards, and backwards for weights and inputs, about three times the forward pass. Frozen
    stages of the backbone have no backward pass; what `model.remat` computes a second time does not
    count, nor do losses and optimizer.

    Args:
        config: uses model and anchors.
        num_classes: classes of the data set.
        image_size: (height, width) of the padded image in pixels.
    """
    model = make_model(config, num_classes).clone(remat=False)
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def forward_and_backward(variables: Any, image: jax.Array) -> Any:
        fixed = {name: part for name, part in variables.items() if name != "params"}
        outputs, derivative = jax.linearize(
            lambda params: model.apply({"params": params, **fixed}, image), variables["params"]
        )
        # Its transpose, which is the backward pass, has the same products the other way round.
        return outputs, derivative(variables["params"])

    traced = jax.jit(forward_and_backward).trace(variables, image)
    return 2 * _multiply_adds(traced.jaxpr.jaxpr)


def estimated_hours(config: Config, num_classes: int) -> float:
    """Hours that a whole run takes on one A100 at an MFU of 30 %: an estimate, not a measurement.

    All images are taken to have the size of the first bucket. Evaluations do not count. In float32
    an A100 does half as much (TF32, 156 x 10^12 operations a second by its data sheet).
    """
    peak = _A100 if config.model.dtype == "bfloat16" else _A100 / 2
    operations = training_operations(config, num_classes, config.data.buckets[0])
    images = config.optimizer.steps * config.optimizer.batch_size
    return operations * images / (0.3 * peak) / 3600


def ideal_seconds(
    config: Config,
    num_classes: int,
    image_sizes: Iterable[tuple[int, int]],
    device_kinds: Sequence[str],
) -> dict[tuple[int, int], float]:
    """Seconds that training on one image takes at the peak of all devices, by the image's size.

    Over the seconds that it does take this is the MFU, the share of the peak that the model uses.
    The peak is `run.peak_teraflops`, or the one that is published for bfloat16. Where neither is
    known, and for float32 without the setting, the result is empty.
    """
    if config.run.peak_teraflops:
        peaks = [1e12 * config.run.peak_teraflops] * len(device_kinds)
    else:
        known = [peak_flops(kind) for kind in device_kinds]
        peaks = [peak for peak in known if peak is not None]
        if config.model.dtype != "bfloat16" or len(peaks) < len(known):
            return {}
    return {
        size: training_operations(config, num_classes, size) / sum(peaks) for size in image_sizes
    }


def _backbone(model: RetinaNet, image: jax.Array) -> Any:
    return model.backbone(image, train=False)


def _fpn(model: RetinaNet, features: Any) -> Any:
    return model.fpn(features)


def _class_head(model: RetinaNet, levels: Any) -> Any:
    return [model.class_head(level) for level in levels]


def _box_head(model: RetinaNet, levels: Any) -> Any:
    return [model.box_head(level) for level in levels]


def _cost(
    part: Callable[[RetinaNet, Any], Any], model: RetinaNet, variables: Any, inputs: Any
) -> tuple[Any, float, float]:
    """Shapes of the outputs of a part of the network, its multiply-adds, and XLA's operations."""
    traced = jax.jit(lambda v, x: model.apply(v, x, method=part)).trace(variables, inputs)
    analysis = traced.lower().cost_analysis() or {}
    return traced.out_info, _multiply_adds(traced.jaxpr.jaxpr), analysis.get("flops", math.nan)


def _multiply_adds(jaxpr: Any) -> int:
    """Multiply-adds of all convolutions in a traced program: outputs times inputs of each."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            count += eqn.outvars[0].aval.size * (math.prod(kernel) // outputs)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += _multiply_adds(inner)
    return count


def table(description: Description) -> str:
    """A description as lines of text for a person."""
    height, width = description.image_size
    lines = [
        f"image of {height} x {width} pixels (height x width), {description.num_classes} classes",
        "",
        f"{'':<12}{'parameters':>14}{'trained':>14}{'multiply-adds':>17}",
    ]
    for name, part in {**description.parts, "total": description.total}.items():
        giga = f"{part.multiply_adds / 1e9:.2f} G"
        lines.append(f"{name:<12}{part.parameters:>14,}{part.trained:>14,}{giga:>17}")
    return "\n".join(
        [
            *lines,
            "",
            f"{'XLA counts, in operations / 2':<34}{description.xla_flops / 2e9:>14,.2f} G",
            f"{'anchors':<34}{description.anchors:>14,}",
            f"{'examples (anchor, class)':<34}{description.examples:>14,}",
            f"{'memory of the parameters (float32)':<34}"
            f"{description.parameter_bytes / 2**20:>14,.1f} MiB",
        ]
    )

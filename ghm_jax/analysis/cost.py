"""What a detector costs: parameters, multiply-adds, anchors; from shapes, without compiling."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ghm_jax.analysis.chips import peak_flops
from ghm_jax.config import Config
from ghm_jax.detection.anchors import level_sizes
from ghm_jax.models import RetinaNet
from ghm_jax.training.build import make_model
from ghm_jax.training.optimizer import frozen_parameters

MODULES = ("backbone", "fpn", "class_head", "box_head")
"""Modules of the network, by their names among its parameters."""


@dataclass(frozen=True, kw_only=True)
class ModuleCost:
    """Cost of a module of the network, or of all of it."""

    parameters: int
    """Trained or frozen, without the running statistics of batch normalization."""
    trained: int
    """Number of trained parameters."""
    multiply_adds: int
    """Of the convolutions, in the forward pass of one image."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Costs of a detector for one image."""

    padded_size: tuple[int, int]
    """(height, width) in pixels."""
    num_classes: int
    modules: dict[str, ModuleCost]
    """By the names in `MODULES`."""
    total: ModuleCost
    xla_flops: float
    """Floating-point operations of the total as counted by XLA before optimization: two per
    multiply-add but none for products with padding, and one per element of all other operations.
    NaN where XLA does not count them for the device."""
    anchors: int
    """Per image."""
    examples: int
    """(anchor, class) pairs per image, the examples of the classification loss."""
    parameter_bytes: int
    """Memory of the parameters; gradients and momentum take the same amount each."""


def describe(config: Config, num_classes: int, padded_size: tuple[int, int]) -> Description:
    """Counts parameters, operations and anchors of the network of a config.

    Multiply-adds are those of the convolutions, including products with zero padding, as in
    published figures. XLA's count of the same network is given for comparison.

    Args:
        config: uses model and anchors.
        num_classes: classes of the data set.
        padded_size: (height, width) of the padded image in pixels.
    """
    # In bfloat16, XLA would count every conversion as an operation.
    model = make_model(config, num_classes).clone(dtype=jnp.float32)
    image = jax.ShapeDtypeStruct((1, *padded_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    params = variables["params"]
    frozen: Any = frozen_parameters(params, config.model.frozen_stages)

    features, *backbone = _cost(_backbone, model, variables, image)
    levels, *fpn = _cost(_fpn, model, variables, features)
    _, *class_head = _cost(_class_head, model, variables, levels)
    _, *box_head = _cost(_box_head, model, variables, levels)
    costs = dict(zip(MODULES, (backbone, fpn, class_head, box_head), strict=True))

    modules = {}
    for name, (multiply_adds, _) in costs.items():
        sizes = [leaf.size for leaf in jax.tree.leaves(params[name])]
        is_frozen = jax.tree.leaves(frozen[name])
        trained = sum(size for size, fixed in zip(sizes, is_frozen, strict=True) if not fixed)
        modules[name] = ModuleCost(
            parameters=sum(sizes), trained=trained, multiply_adds=int(multiply_adds)
        )
    anchors = sum(level_sizes(padded_size, model.anchors_per_cell))
    return Description(
        padded_size=padded_size,
        num_classes=num_classes,
        modules=modules,
        total=ModuleCost(
            parameters=sum(module.parameters for module in modules.values()),
            trained=sum(module.trained for module in modules.values()),
            multiply_adds=sum(module.multiply_adds for module in modules.values()),
        ),
        xla_flops=sum(xla_flops for _, xla_flops in costs.values()),
        anchors=anchors,
        examples=anchors * num_classes,
        parameter_bytes=sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params)),
    )


def training_operations(config: Config, num_classes: int, padded_size: tuple[int, int]) -> int:
    """Operations of the convolutions in a training step for one image: two per multiply-add.

    Forward pass and backward pass for weights and inputs: about three times the forward pass.
    Frozen stages of the backbone have no backward pass. What `model.remat` recomputes, the losses
    and the optimizer are not counted.

    Args:
        config: uses model and anchors.
        num_classes: classes of the data set.
        padded_size: (height, width) of the padded image in pixels.
    """
    model = make_model(config, num_classes).clone(remat=False)
    image = jax.ShapeDtypeStruct((1, *padded_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def forward_and_backward(variables: Any, image: jax.Array) -> Any:
        fixed = {name: value for name, value in variables.items() if name != "params"}
        outputs, derivative = jax.linearize(
            lambda params: model.apply({"params": params, **fixed}, image), variables["params"]
        )
        # The backward pass is its transpose, which has the same products.
        return outputs, derivative(variables["params"])

    traced = jax.jit(forward_and_backward).trace(variables, image)
    return 2 * _multiply_adds(traced.jaxpr.jaxpr)


def ideal_seconds(
    config: Config,
    num_classes: int,
    padded_sizes: Iterable[tuple[int, int]],
    device_kinds: Sequence[str],
) -> dict[tuple[int, int], float]:
    """Seconds per training image if all devices ran at their peak, by padded size of the image.

    Divided by the measured seconds this is the MFU (model FLOPs utilization). The peak is
    `run.peak_teraflops` or the published one for bfloat16. Empty where neither is known, and for
    float32 without the setting.
    """
    if config.run.peak_teraflops:
        peaks = [1e12 * config.run.peak_teraflops] * len(device_kinds)
    else:
        known = [peak_flops(kind) for kind in device_kinds]
        peaks = [peak for peak in known if peak is not None]
        if config.model.dtype != "bfloat16" or len(peaks) < len(known):
            return {}
    return {
        size: training_operations(config, num_classes, size) / sum(peaks) for size in padded_sizes
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
    module: Callable[[RetinaNet, Any], Any], model: RetinaNet, variables: Any, inputs: Any
) -> tuple[Any, float, float]:
    """Shapes of a module's outputs, its multiply-adds, and the operations that XLA counts."""
    traced = jax.jit(lambda v, x: model.apply(v, x, method=module)).trace(variables, inputs)
    analysis = traced.lower().cost_analysis() or {}
    return traced.out_info, _multiply_adds(traced.jaxpr.jaxpr), analysis.get("flops", math.nan)


def _multiply_adds(jaxpr: Any) -> int:
    """Multiply-adds of all convolutions in a traced program: outputs times inputs per output.

    Those of 1x1 are matrix products.
    """
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            x = eqn.invars[0].aval.shape
            summed = eqn.params["dimension_numbers"][0][0]
            count += eqn.outvars[0].aval.size * math.prod(x[axis] for axis in summed)
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            count += eqn.outvars[0].aval.size * (math.prod(kernel) // outputs)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += _multiply_adds(inner)
    return count

"""Time and memory of the losses, value and gradient, on the logits of one image."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghm_jax import losses
from ghm_jax.bench.timing import time_rounds
from ghm_jax.detection.anchors import level_sizes

PADDED_SIZES = ((640, 640), (800, 1344))
ANCHORS_PER_CELL = 9
NUM_CLASSES = 80


@dataclass(frozen=True)
class LossTime:
    """Time of one loss at one image size."""

    padded_size: tuple[int, int]
    """(height, width) in pixels."""
    loss: str
    milliseconds: float
    """Median over the repeats."""
    fastest: float
    """Milliseconds of the fastest repeat."""
    to_focal: float
    """Median time relative to focal loss at this size."""
    extra_memory: float | None
    """Temporary memory, excluding inputs and outputs, relative to the logits; None: unknown."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the losses for one image, as of a detector early in training."""

    logits: np.ndarray
    """f32[A, K]."""
    classes: np.ndarray
    """i32[A], BACKGROUND or IGNORE where there is no class."""
    deltas: np.ndarray
    """f32[A, 4]."""
    box_targets: np.ndarray
    """f32[A, 4]."""


def measure_losses(
    padded_sizes: tuple[tuple[int, int], ...] = PADDED_SIZES, repeats: int = 7
) -> list[LossTime]:
    """Times every loss at every image size, and with torch installed the published algorithm.

    Args:
        padded_sizes: (height, width) in pixels, with 9 anchors per cell and 80 classes.
        repeats: timed calls of each loss.
    """
    measured = []
    for size in padded_sizes:
        inputs = make_inputs(sum(level_sizes(size, ANCHORS_PER_CELL)))
        calls, memory = _jax_calls(inputs)
        if importlib.util.find_spec("torch") is not None:
            calls |= _torch_calls(inputs)
        times = dict(zip(calls, time_rounds(list(calls.values()), repeats).wall, strict=True))
        median = {name: float(np.median(values)) for name, values in times.items()}
        measured += [
            LossTime(
                padded_size=size,
                loss=name,
                milliseconds=median[name],
                fastest=float(values.min()),
                to_focal=median[name] / median["focal loss"],
                extra_memory=memory.get(name),
            )
            for name, values in times.items()
        ]
    return measured


def make_inputs(num_anchors: int, seed: int = 0) -> Inputs:
    """Random inputs with 0.2 percent positive and 0.3 percent ignored anchors."""
    rng = np.random.default_rng(seed)
    kind = rng.uniform(size=num_anchors)
    classes = np.where(kind < 0.005, losses.IGNORE, losses.BACKGROUND)
    classes = np.where(kind < 0.002, rng.integers(0, NUM_CLASSES, num_anchors), classes)
    return Inputs(
        logits=rng.normal(-4, 1.5, (num_anchors, NUM_CLASSES)).astype(np.float32),
        classes=classes.astype(np.int32),
        deltas=rng.normal(0, 0.2, (num_anchors, 4)).astype(np.float32),
        box_targets=rng.normal(0, 0.2, (num_anchors, 4)).astype(np.float32),
    )


def _jax_calls(inputs: Inputs) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    positive = (inputs.classes >= 0)[:, None]
    of_classes = (inputs.logits, inputs.classes, None)
    of_boxes = (inputs.deltas, inputs.box_targets, positive)
    exact = functools.partial(losses.ghm_c_loss, density="exact")
    table: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]] = {
        "cross-entropy": (losses.cross_entropy_loss, of_classes, None),
        "focal loss": (losses.focal_loss, of_classes, None),
        "focal loss (optax)": (_optax_focal_loss, of_classes, None),
        "GHM-C": (losses.ghm_c_loss, of_classes, losses.init_ghm_state(30)),
        "GHM-C exact": (exact, of_classes, None),
        "GHM-R": (losses.ghm_r_loss, of_boxes, losses.init_ghm_state(10)),
    }
    calls, memory = {}, {}
    for name, (loss, arrays, state) in table.items():
        on_device = jax.device_put((*arrays, state))
        compiled = jax.jit(_value_and_gradient(loss)).lower(*on_device).compile()
        calls[name] = functools.partial(_run, compiled, on_device)
        analysis = compiled.memory_analysis()
        if analysis is not None:
            memory[name] = analysis.temp_size_in_bytes / jnp.asarray(arrays[0]).nbytes
    return calls, memory


def _optax_focal_loss(logits: jax.Array, classes: jax.Array, *_: None) -> tuple[Any, ...]:
    """`focal_loss` with optax's function, differentiated by JAX."""
    targets = jax.nn.one_hot(classes, NUM_CLASSES)
    terms = optax.losses.sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0)
    used = (classes != losses.IGNORE)[:, None]
    return jnp.where(used, terms, 0.0).sum() / jnp.maximum((classes >= 0).sum(), 1), None, None


def _value_and_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    def value(x: jax.Array, targets: Any, mask: Any, state: Any) -> tuple[jax.Array, Any]:
        result, new_state, stats = loss(x, targets, mask, state)
        return result, (new_state, stats)

    return jax.value_and_grad(value, has_aux=True)


def _run(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    jax.block_until_ready(compiled(*arguments))


def _torch_calls(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The published algorithm in eager PyTorch: one masked assignment per bin."""
    import torch  # pyright: ignore[reportMissingImports]

    classes = torch.from_numpy(inputs.classes).long()
    targets = torch.nn.functional.one_hot(classes.clamp(min=0), NUM_CLASSES).float()
    targets *= (classes >= 0)[:, None]
    valid = (classes != losses.IGNORE)[:, None].expand_as(targets)
    edges = torch.arange(31).float() / 30
    edges[-1] += 1e-6
    moving = torch.zeros(30)

    def ghm_c() -> None:
        logits = torch.from_numpy(inputs.logits).requires_grad_()
        norm = torch.abs(logits.sigmoid().detach() - targets)
        weights, filled, total = torch.zeros_like(norm), 0, valid.float().sum().item()
        for i in range(30):
            inside = (norm >= edges[i]) & (norm < edges[i + 1]) & valid
            count = inside.sum().item()
            if count:
                moving[i] = 0.75 * moving[i] + 0.25 * count
                weights[inside] = total / moving[i]
                filled += 1
        weights = weights / max(filled, 1)
        cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
        (cross_entropy(logits, targets, weights, reduction="sum") / total).backward()

    return {"GHM-C, published algorithm (torch)": ghm_c}

"""How the losses read their arguments: one rule for each, whatever holds it.

Values are looked at where they are known. What is traced (an argument under `jax.jit`, `jax.vmap`
or `jax.pmap`) cannot be: there the losses keep to the meaning that their docstrings give.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = jax.Array | np.ndarray

_ROUNDING = 0.01
"""A number of bfloat16 just above 1 is 1.0078."""


def is_traced(value: Any) -> bool:
    """Whether a value is unknown until the compiled program runs."""
    return isinstance(value, Tracer)


def read_array(name: str, values: Any) -> Array:
    """Numbers or bools in an array of JAX or NumPy, or in nested lists; not yet in JAX's types.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(values, jax.Array | np.ndarray):
        if isinstance(values, Mapping) or hasattr(values, "_fields"):
            kind = type(values).__name__
            raise ValueError(f"{name} must be an array, got a {kind}; a state is given as state=")
        leaves = jax.tree.leaves(values)
        # The second: such as a parameter of Flax NNX.
        of_jax = any(
            isinstance(leaf, jax.Array) or hasattr(leaf, "__jax_array__") for leaf in leaves
        )
        try:
            values = (jnp if of_jax else np).asarray(values)
        except Exception as error:  # whatever the conversion of a foreign type raises
            kind = type(values).__name__
            raise ValueError(
                f"{name} must be an array, or lists of one length, got a {kind}"
            ) from error
    real = jnp.issubdtype(values.dtype, jnp.number) and not jnp.issubdtype(
        values.dtype, jnp.complexfloating
    )
    if not (real or values.dtype == bool):
        raise ValueError(f"{name} must hold numbers, got {values.dtype}")
    return values


Example = tuple[Any, Any, Any]
"""Predictions, targets and mask that belong together."""


def read_levels(predictions: Any, targets: Any, mask: Any) -> list[Example]:
    """The arguments level by level if predictions and targets are lists or tuples of as many
    arrays, and the mask is as well or is None; otherwise the arguments as they are.

    Nothing is concatenated, so that the losses read the outputs of a network where they lie.
    """
    given = [x for x in (predictions, targets, mask) if x is not None]
    levels = len(predictions) if _is_levels(predictions) else 0
    if not levels or not all(_is_levels(x) and len(x) == levels for x in given):
        return [(predictions, targets, mask)]
    return list(zip(predictions, targets, mask or [None] * levels, strict=True))


def _is_levels(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(x, jax.Array | np.ndarray) and x.ndim > 0 for x in values
    )


def read_floats(name: str, values: Any) -> jax.Array:
    """As f32[...]."""
    return jnp.asarray(read_array(name, values)).astype(jnp.float32)


def read_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """The mask as bool[shape], True where an example counts; None: all.

    A number counts if it is above 0, as label weights do in the published code: -1 and NaN leave
    out. Only axes of size 1 are broadcast: a missing axis is an error.
    """
    if mask is None:
        return None
    mask = read_array("mask", mask)
    if mask.ndim != len(shape) or any(m not in (1, s) for m, s in zip(mask.shape, shape)):  # noqa: B905 (ranks are equal)
        raise ValueError(
            f"mask must have the shape {shape} or 1 in place of an axis, got {mask.shape}"
        )
    mask = jnp.asarray(mask)
    return jnp.broadcast_to(mask if mask.dtype == bool else mask > 0, shape)


def read_setting(name: str, value: Any, kind: type = float) -> Any:
    """A setting as a Python value, so that arrays of one element do as well.

    A float that is traced stays so, as f32[] without gradient: a schedule. Its bounds are not
    checked.

    Raises:
        ValueError: another type, more than one element, or traced where the compiled program
            depends on the value.
    """
    if is_traced(value):
        if kind is not float:
            raise ValueError(f"{name}: must be a Python {kind.__name__}, got a traced value")
        if value.shape != ():
            raise ValueError(f"{name}: must be one number, got the shape {value.shape}")
        return jax.lax.stop_gradient(value.astype(jnp.float32))
    if isinstance(value, jax.Array | np.ndarray | np.generic) and value.size == 1:
        value = np.asarray(value).item()
    allowed = {float: (int, float), int: int, bool: (bool, int)}.get(kind, kind)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: must be a Python {kind.__name__}, got {value!r}")
    return value


def read_positive(name: str, value: Any) -> Any:
    """A setting above 0; unchecked where it is traced."""
    value = read_setting(name, value)
    if not is_traced(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def read_class_indices(
    name: str, targets: Array, num_classes: int, mask: Any, *, lowest: int | None
) -> jax.Array:
    """Class indices as i32[...].

    In a type of 8 or 16 bits they would not reach the number of classes, and -1 would be one of
    them. An index that is not known and does not fit into int32 becomes `num_classes`, or -3: no
    class, and neither background nor ignored.

    Args:
        name: for messages.
        targets: integers.
        num_classes: K.
        mask: of the losses, [..., K] or [...]; positions it leaves out are not looked at.
        lowest: smallest index that has a meaning; None: any does.

    Raises:
        ValueError: an index that is known, counts, and has no meaning.
    """
    markers = "" if lowest is None else ", -1 (background) or -2 (left out)"
    one = "; give 0/1 labels of one logit in the shape of the logits" if num_classes == 1 else ""
    _check(
        targets,
        mask,
        lambda index: (index < num_classes) & (index >= (-np.inf if lowest is None else lowest)),
        f"{name} must be class indices below {num_classes}{markers}, got {{}}{one}",
    )
    limits = jnp.iinfo(targets.dtype)
    if limits.max > jnp.iinfo(jnp.int32).max:
        clip = np.clip if isinstance(targets, np.ndarray) else jnp.clip
        targets = clip(targets, max(limits.min, -3), num_classes)
    return jnp.asarray(targets).astype(jnp.int32)


def check_fractions(name: str, values: Array, mask: Any, remedy: str) -> None:
    """Raises ValueError for a known value that counts and lies outside [0, 1]. NaN is let through:
    the losses report it."""
    low, high = -_ROUNDING, 1 + _ROUNDING
    _check(
        values,
        mask,
        lambda value: ~np.isfinite(value) | ((value >= low) & (value <= high)),
        f"{name} must be in [0, 1], got {{}}; {remedy}",
    )


def _check(
    values: Array, mask: Any, allowed: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    numbers = known(values)
    if numbers is None:
        return
    refused = ~allowed(numbers)
    if mask is not None and refused.any():
        used = known(read_array("mask", mask))
        if used is None:
            return
        used = used > 0
        if used.ndim > numbers.ndim:
            used = used.any(axis=-1)
        refused = refused & used
    if refused.any():
        raise ValueError(message.format(numbers[refused].flat[0]))


def known(values: Array) -> np.ndarray | None:
    """Values that can be looked at, or None if they are traced or lie in other processes too."""
    if isinstance(values, jax.Array):
        if is_traced(values) or not values.is_fully_addressable:
            return None
        values = np.asarray(values)
    # bfloat16 and the like, of which NumPy knows little.
    return values.astype(np.float32) if values.dtype.kind == "V" else values

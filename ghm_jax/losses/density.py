"""Gradient density: how many examples there are at a gradient norm, per unit of gradient norm.

Source: Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, equations 4-6 and 9.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghm_jax.losses.arguments import (
    check_fractions,
    is_traced,
    read_array,
    read_floats,
    read_mask,
    read_setting,
)


def gradient_density(
    gradient_norm: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon: float,
    axis_name: str | None = None,
) -> jax.Array:
    """The exact gradient density GD(g) at the gradient norm of every example (equation 4).

    Number of examples in the window [g - epsilon/2, g + epsilon/2), divided by the length of the
    window inside [0, 1]. Computed by sorting, O(N log N); every replica holds the norms of all.

    Args:
        gradient_norm: float[...] in [0, 1]; compared in float32.
        mask: bool or 0/1, same shape or 1 in place of an axis; examples that count. None: all that
            are finite.
        epsilon: width of the window, in (0, 1].
        axis_name: replica axis whose examples count as well.

    Returns:
        f32[...], 0 where masked.

    Raises:
        ValueError: epsilon or a norm out of range, or a mask of another shape.
    """
    epsilon = read_setting("epsilon", epsilon)
    if not is_traced(epsilon) and not 0.0 < epsilon <= 1.0:
        raise ValueError(f"epsilon must be in (0, 1], got {epsilon}")
    norm, valid = read_norm(gradient_norm, mask)
    valid = jnp.isfinite(norm) if valid is None else valid
    return density_at(norm, valid, epsilon, axis_name)


def read_norm(gradient_norm: Any, mask: Any) -> tuple[jax.Array, jax.Array | None]:
    """Gradient norms as f32[...] and their mask as bool[...].

    Raises:
        ValueError: a known norm outside [0, 1] that counts, or a mask of another shape.
    """
    norm = read_array("gradient_norm", gradient_norm)
    used = read_mask(mask, norm.shape)
    check_fractions("gradient_norm", norm, mask, "scale it, or leave it out with `mask`")
    return read_floats("gradient_norm", norm), used


def density_at(norm: jax.Array, valid: jax.Array, epsilon: Any, axis_name: str | None) -> jax.Array:
    """`gradient_density` of f32[...] and bool[...]."""
    norm = jnp.where(valid, norm, 0.0)
    known = jnp.where(valid, norm, jnp.inf).ravel()
    if axis_name is not None:
        known = jax.lax.all_gather(known, axis_name, tiled=True)
    ordered = jnp.sort(_as_integers(known))

    upper, lower = norm + epsilon / 2, norm - epsilon / 2
    below_upper = jnp.searchsorted(ordered, _as_integers(upper))
    below_lower = jnp.searchsorted(ordered, _as_integers(jnp.maximum(lower, 0.0)))
    length = jnp.minimum(upper, 1.0) - jnp.maximum(lower, 0.0)
    count = (below_upper - below_lower).astype(jnp.float32)
    return jnp.where(valid, count / length, 0.0)


def _as_integers(norm: jax.Array) -> jax.Array:
    """Non-negative floats as integers in the same order, which XLA sorts much faster."""
    return jax.lax.bitcast_convert_type(norm + 0.0, jnp.int32)  # + 0.0 turns -0.0 into 0.0


def bin_index(gradient_norm: jax.Array, mask: jax.Array | None, bins: int) -> jax.Array:
    """The bin of every example (equation 9), in a narrow type because it is kept for the weights.

    Args:
        gradient_norm: f32[...], 0 to 1. Bin j holds [j / bins, (j + 1) / bins), edges
            rounded to float32; the last one holds 1 as well.
        mask: bool[...] of the same shape, or None.
        bins: number of bins.

    Returns:
        u8[...] (i32 for many bins): 0 to bins - 1; `bins` where masked; `bins` + 1
        where the norm is not finite.
    """
    finite = jnp.isfinite(gradient_norm)
    index = jnp.where(finite, gradient_norm, 0.0) * _scale(bins)
    # Clipped, because JAX silently drops an out-of-range scatter.
    index = jnp.clip(index.astype(jnp.int32), 0, bins - 1)
    index = jnp.where(finite, index, bins + 1)
    if mask is not None:
        index = jnp.where(mask, index, bins)
    return index.astype(jnp.uint8 if bins < 255 else jnp.int32)


def _scale(bins: int) -> np.float32:
    """The factor that puts every edge, j / bins in float32, at j or just above it."""
    edges = np.arange(bins, dtype=np.float32) / np.float32(bins)
    scale = np.float32(bins)
    if (np.floor(edges * scale) == np.arange(bins)).all():
        return scale
    return np.nextafter(scale, np.float32(np.inf))  # enough for every number of bins up to 2,000


def count_bins(index: jax.Array, slots: int) -> jax.Array:
    """i32[slots]: how many elements of `index` (integers in [0, slots)) have each value.

    Integers, because float32 stops counting at 2**24 and one 800x1344 image has 1.6e7 examples.
    Scattering is fastest on CPUs; elsewhere thousands of threads would queue for a few counters, so
    every element is compared with every slot instead.
    """
    count = functools.partial(count_by_comparing, slots=slots)
    on_cpu = functools.partial(count_by_scattering, slots=slots)
    return jax.lax.platform_dependent(index, cpu=on_cpu, default=count)


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index] for a short table, [...] of integers in [0, table.size).

    A TPU looks up one element at a time, so there every element is compared with every index
    instead, in one pass with what comes before and after it.
    """
    return jax.lax.platform_dependent(
        table, index, cpu=lambda table, index: table[index], default=look_up_by_comparing
    )


_UNROLLED = 64  # a longer table is a loop: programs would take long to compile


def look_up_by_comparing(table: jax.Array, index: jax.Array) -> jax.Array:
    found = jnp.broadcast_to(table[0], index.shape)
    if table.size > _UNROLLED:
        return jax.lax.fori_loop(
            1, table.size, lambda k, found: jnp.where(index == k, table[k], found), found
        )
    for k in range(1, table.size):
        found = jnp.where(index == k, table[k], found)
    return found


def count_by_scattering(index: jax.Array, *, slots: int) -> jax.Array:
    # Three elements at a time, as one index into slots**3 counters: one core adds them one after
    # another, and most of them to the same few counters.
    together = 3 if slots <= 40 else 1
    index = index.ravel()
    size = index.size // together
    slices = [index[i * size : (i + 1) * size].astype(jnp.int32) for i in range(together)]
    joint = functools.reduce(lambda joint, values: joint * slots + values, slices)
    counts = _scatter_ones(joint, slots**together).reshape((slots,) * together)
    axes = set(range(together))
    marginals = [counts.sum(axis=tuple(axes - {axis}), dtype=jnp.int32) for axis in axes]
    return sum(marginals, _scatter_ones(index[together * size :], slots))


def _scatter_ones(index: jax.Array, slots: int) -> jax.Array:
    ones = jnp.ones((), jnp.int32)
    return jnp.zeros(slots, jnp.int32).at[index].add(ones, mode="promise_in_bounds")


def count_by_comparing(index: jax.Array, *, slots: int) -> jax.Array:
    # Slots first, and no reshape: the index then needs no copy in another layout.
    numbers = jnp.arange(slots, dtype=index.dtype).reshape(-1, *[1] * index.ndim)
    equal = index[None] == numbers
    return jnp.sum(equal, axis=tuple(range(1, equal.ndim)), dtype=jnp.int32)


def shares(values: np.ndarray) -> np.ndarray:
    """values / sum, or zeros where the sum is zero."""
    total = values.sum()
    return values / total if total > 0 else np.zeros_like(values)

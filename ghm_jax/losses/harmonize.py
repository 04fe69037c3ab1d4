"""Gradient harmonizing: weights examples by the inverse density of their gradient norm.

Source: Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, equations 4-13.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.bounds import problems
from ghm_jax.harmonizing import Density, Harmonizing, Normalizer
from ghm_jax.losses.density import bin_index, count_bins, gradient_density


class GHMState(NamedTuple):
    """Moving average of the histogram of gradient norms; part of the train state."""

    counts: jax.Array
    """f32[bins]. Average number of examples per bin; zeros before the first step."""
    step: jax.Array
    """i32[]. Updates so far, for the bias correction."""

    def average(self, settings: Harmonizing) -> jax.Array:
        """f32[bins]: the counts that weights are computed from, S_j of equation 12.

        With `bias_correction`, corrected for the start at zero, and NaN before the first step.
        """
        if not settings.bias_correction:
            return self.counts
        return self.counts / (1 - settings.momentum ** self.step.astype(jnp.float32))


class LossStats(NamedTuple):
    """What a loss saw, over all replicas where `axis_name` is given. Carries no gradient."""

    plain_loss: jax.Array
    """f32[]. Mean loss per example without any weights. Watch this one: the harmonized value
    itself stays near a constant (about 1 for GHM-C) however good the model is."""
    num_valid: jax.Array
    """f32[]. Examples that were counted."""
    num_nonfinite: jax.Array
    """f32[]. Examples excluded because their gradient norm was NaN or infinite."""
    counts: jax.Array | None = None
    """f32[bins]. Examples of this call per bin of gradient norm; None without a histogram."""
    weights: jax.Array | None = None
    """f32[bins]. Weight of an example in each bin (with exact density, the mean weight)."""


def init_ghm_state(bins: int) -> GHMState:
    """The state before the first step, for a histogram of `bins` bins."""
    return GHMState(jnp.zeros(bins, jnp.float32), jnp.zeros((), jnp.int32))


def harmonize(
    gradient_norm: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    bins: int = 30,
    momentum: float = 0.75,
    normalizer: Normalizer = "nonempty",
    bias_correction: bool = True,
    min_count: float = 10.0,
    strength: float = 1.0,
    density: Density = "histogram",
    batch_counts: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Weights that make all bins of the gradient norm contribute equally.

    `Harmonizing` documents the formula and the keywords from `bins` to `density`.

    Args:
        gradient_norm: [...] float, |d loss / d prediction| scaled into [0, 1]. Bins are decided in
            float32; a value on an edge belongs to the bin above it, 1 to the last bin.
        mask: [...] bool or 0/1, same rank, axes of size 1 are broadcast; False: the example
            is not counted and has weight 0. None: all are counted.
        state: average so far; its length overrides `bins`. None: this batch alone.
        batch_counts: f32[bins], the histogram of the whole batch, when this call sees one
            microbatch (gradient accumulation): the sum of `counts` over all of them, from a first
            pass. Pass the same state for every microbatch: each call returns the same new one.
        axis_name: replica axis over which the histogram is summed; None: one histogram per replica.

    Returns:
        weights f32[...] (0 where masked), the new state (None if none was given), and statistics
        whose `plain_loss` is the mean gradient norm.

    Raises:
        ValueError: mask of another shape, a setting out of range, or exact density with a state
            or `batch_counts`, which are histograms.

    Examples:
        Six easy examples and two hard ones; each group gets half of the total weight.

        >>> norm = jnp.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
        >>> weights, _, stats = harmonize(norm, bins=2, min_count=0)
        >>> [round(float(w), 4) for w in stats.weights]
        [0.6667, 2.0]
        >>> float(weights.mean())
        1.0
    """
    settings = Harmonizing(
        bins=bins, momentum=momentum, normalizer=normalizer, bias_correction=bias_correction,
        min_count=min_count, strength=strength, density=density,
    )  # fmt: skip
    return weigh(gradient_norm, mask, state, settings, batch_counts, axis_name)


def weigh(
    gradient_norm: jax.Array,
    mask: jax.Array | None,
    state: GHMState | None,
    settings: Harmonizing,
    batch_counts: jax.Array | None,
    axis_name: str | None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """`harmonize` with its settings as one object."""
    if state is not None:
        settings = dataclasses.replace(settings, bins=state.counts.shape[0])
    for name, problem in problems(settings):
        raise ValueError(f"{name}: {problem}")
    exact, bins = settings.density == "exact", settings.bins
    if exact and not (state is None and batch_counts is None):
        raise ValueError("density='exact' has no histogram: state and batch_counts must be None")
    norm = jax.lax.stop_gradient(gradient_norm).astype(jnp.float32)
    used = None if mask is None else broadcast_mask(mask, norm.shape)
    index = bin_index(norm, used, bins)
    valid = index < bins
    # Cast to float32 before the sum over the replicas: the counts of a pod overflow int32.
    seen = psum(count_bins(index, bins + 2).astype(jnp.float32), axis_name)
    seen, num_nonfinite = seen[:bins], seen[bins + 1]
    if batch_counts is None:
        batch_counts = seen
    num_valid = batch_counts.sum()

    if exact:
        weights = _exact_weights(norm, valid, num_valid, settings, axis_name)
        table = jnp.zeros(bins + 2).at[index.ravel()].add(weights.ravel())[:bins]
        table = psum(table, axis_name) / jnp.maximum(seen, 1.0)
    else:
        table, state = _histogram_weights(batch_counts, state, settings)
        weights = jnp.append(table, jnp.zeros(2))[index]
    total_norm = psum(jnp.sum(jnp.where(valid, norm, 0.0)), axis_name)
    mean_norm = total_norm / jnp.maximum(num_valid, 1.0)
    return weights, state, LossStats(mean_norm, num_valid, num_nonfinite, seen, table)


_TINY = 1e-12  # a bin with a smaller average counts as empty: its inverse would overflow


def _histogram_weights(
    seen: jax.Array, state: GHMState | None, settings: Harmonizing
) -> tuple[jax.Array, GHMState | None]:
    """Weights f32[bins] from the histograms of a batch and those before it, and the next state."""
    num_valid = seen.sum()
    state = None if state is None else _update(state, seen, settings)
    counts = seen if state is None else state.average(settings)
    if settings.bias_correction:
        filled, total = counts > _TINY, counts.sum()
    else:
        filled, total = seen > 0, num_valid
    weights = _inverse(counts, settings)
    return _scale(weights, total, jnp.sum(counts * weights * filled), num_valid, settings), state


def _exact_weights(
    norm: jax.Array,
    valid: jax.Array,
    num_valid: jax.Array,
    settings: Harmonizing,
    axis_name: str | None,
) -> jax.Array:
    """Weights f32[...] from the density at each example's gradient norm; 0 where not valid."""
    epsilon = 1 / settings.bins
    density = gradient_density(norm, valid, epsilon=epsilon, axis_name=axis_name)
    weights = jnp.where(valid, _inverse(density / settings.bins, settings), 0.0)
    return _scale(weights, num_valid, psum(weights.sum(), axis_name), num_valid, settings)


def _update(state: GHMState, seen: jax.Array, settings: Harmonizing) -> GHMState:
    """The state after a batch with the counts `seen`: equation 12."""
    counts = settings.momentum * state.counts + (1 - settings.momentum) * seen
    if not settings.bias_correction:
        counts = jnp.where(seen > 0, counts, state.counts)
    return GHMState(counts, state.step + 1)


def _inverse(counts: jax.Array, settings: Harmonizing) -> jax.Array:
    """D**-tau with D = max(counts, min_count); 1 where both are 0, where there is no example."""
    density = jnp.maximum(counts, settings.min_count)
    density = jnp.where(density > _TINY, density, 1.0)
    return 1.0 / density if settings.strength == 1.0 else density**-settings.strength


def _scale(
    weights: jax.Array,
    total: jax.Array,
    total_weight: jax.Array,
    num_valid: jax.Array,
    settings: Harmonizing,
) -> jax.Array:
    """Scales weights D**-tau to a mean of 1 over the `total` examples, or as in the paper."""
    if settings.normalizer == "bins":
        return weights * (num_valid / settings.bins) ** settings.strength
    return weights * (total / jnp.maximum(total_weight, _TINY))


def psum(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum over the replicas of `axis_name`; None: x itself."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def broadcast_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask as bool[shape]. Only axes of size 1 are broadcast: a missing axis is an error."""
    if mask.ndim != len(shape) or any(m not in (1, s) for m, s in zip(mask.shape, shape)):  # noqa: B905 (ranks are equal)
        raise ValueError(
            f"mask must have the shape {shape} or 1 in place of an axis, got {mask.shape}"
        )
    return jnp.broadcast_to(mask.astype(bool), shape)

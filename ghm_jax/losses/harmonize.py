"""Gradient harmonizing: weigh examples by the inverse density of their gradient norm.

Source: Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, equations 4-13.
"""

import types
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.losses.density import count_regions, gradient_density, region_index

REFERENCE = types.MappingProxyType(
    {"normalizer": "nonempty", "bias_correction": False, "min_count": 0.0, "strength": 1.0}
)
"""Keyword arguments that make any loss here behave as the published PyTorch code."""


class GHMState(NamedTuple):
    """Moving average of the histogram of gradient norms; part of the train state."""

    counts: jax.Array
    """f32[bins]. Average number of examples per bin; zeros before the first step."""
    step: jax.Array
    """i32[]. Updates so far, for the bias correction."""


class LossStats(NamedTuple):
    """What a loss saw, over all replicas where `axis_name` is given. Carries no gradient."""

    plain_loss: jax.Array
    """f32[]. Mean loss per example without any weights. Watch this one: the harmonized value
    itself stays near a constant (about 1 for GHM-C) however good the model is."""
    num_valid: jax.Array
    """f32[]. Examples that counted."""
    num_nonfinite: jax.Array
    """f32[]. Examples left out because their gradient norm was NaN or infinite."""
    counts: jax.Array | None = None
    """f32[bins]. Examples of this call per bin of gradient norm; None without a histogram."""
    weights: jax.Array | None = None
    """f32[bins]. Weight of an example of each bin (with exact density, their mean there)."""


def init_ghm_state(bins: int) -> GHMState:
    """The state before the first step, for `bins` unit regions of gradient norm."""
    return GHMState(jnp.zeros(bins, jnp.float32), jnp.zeros((), jnp.int32))


def harmonize(
    gradient_norm: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    bins: int = 30,
    momentum: float = 0.75,
    normalizer: Literal["nonempty", "bins"] = "nonempty",
    bias_correction: bool = True,
    min_count: float = 10.0,
    strength: float = 1.0,
    density: Literal["histogram", "exact"] = "histogram",
    batch_counts: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Weights that make every part of the gradient-norm axis contribute alike.

    With S_j the averaged number of examples in bin j, D_j = max(S_j, min_count) and tau the
    strength, an example in bin j has the weight

        w_j = D_j**-tau * sum_k S_k / sum_k S_k D_k**-tau,

    whose mean over the averaged histogram is 1. Without floor (min_count = 0), at tau = 1, this is
    beta of equation 10 with the number of filled bins in place of M. The floor is ours: a bin with
    fewer than `min_count` examples is treated as if it had that many, so that single examples
    never steer the training; a batch in which no bin reaches the floor gets weights of 1.

    Args:
        gradient_norm: [...] float, |d loss / d prediction| scaled into [0, 1]. Bins are decided in
            float32; a value on an edge belongs to the bin above it, 1 to the last bin.
        mask: [...] bool or 0/1, same rank, axes of size 1 are broadcast; False: the example
            neither counts nor weighs. None: all count.
        state: average so far; its length overrides `bins`. None: this batch alone.
        bins: unit regions (M of equation 9), used when there is no state.
        momentum: in [0, 1), share of the old average (alpha of equation 12).
        normalizer: "nonempty" as above; "bins": w_j = (N / (M D_j))**tau with N the number of
            examples in the batch and M the number of bins, as printed in the paper.
        bias_correction: divide the average by 1 - momentum**step, so that the first steps are
            right. False: as in the published code, the average starts at zero (the first weights
            are 1 / (1 - momentum) times too large), bins without an example stay as they were,
            and only the bins filled now count as filled.
        min_count: density floor in examples of the whole batch, all replicas; 0 for none.
        strength: tau in [0, 1]; 0 gives weights of 1.
        density: "histogram": of unit regions, as above. "exact": S is the number of examples
            within 1 / (2 bins) of the example's own gradient norm, scaled to a full region at the
            ends of [0, 1] (equations 4-6); every example has its own weight. Sorts the batch.
        batch_counts: f32[bins], the histogram of the whole batch, when this call sees a part of
            it (gradient accumulation): the sum of `counts` over all parts, from a first pass.
            Give every part the same state: each returns the same new one.
        axis_name: replica axis over which the histogram is summed; None: each replica for itself.

    Returns:
        weights f32[...] (0 where masked), the new state (None if none was given), and statistics
        whose `plain_loss` is the mean gradient norm.

    Raises:
        ValueError: mask of another shape, a setting out of range, or exact density with a state
            or `batch_counts`, which are histograms.

    Examples:
        Six settled examples and two that are wrong; each group weighs half.

        >>> norm = jnp.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
        >>> weights, _, stats = harmonize(norm, bins=2, min_count=0)
        >>> [round(float(w), 4) for w in stats.weights]
        [0.6667, 2.0]
        >>> float(weights.mean())
        1.0
    """
    bins = bins if state is None else state.counts.shape[0]
    _check_settings(bins, momentum, normalizer, min_count, strength, density)
    if density == "exact" and not (state is None and batch_counts is None):
        raise ValueError("density='exact' has no histogram: state and batch_counts must be None")
    norm = jax.lax.stop_gradient(gradient_norm).astype(jnp.float32)
    used = None if mask is None else broadcast_mask(mask, norm.shape)
    index = region_index(norm, used, bins)
    valid = index < bins
    total_norm = jnp.sum(jnp.where(valid, norm, 0.0))
    # Counts become float32 before they meet those of the other replicas: a pod's overflow int32.
    seen = psum(count_regions(index, bins + 2).astype(jnp.float32), axis_name)
    total_norm = psum(total_norm, axis_name)
    seen, num_nonfinite = seen[:bins], seen[bins + 1]
    whole = seen if batch_counts is None else batch_counts
    num_valid = whole.sum()

    if density == "exact":
        counts = gradient_density(norm, valid, epsilon=1 / bins, axis_name=axis_name) / bins
        weights = jnp.where(valid, _inverse(counts, min_count, strength), 0.0)
        total, total_inverse = num_valid, psum(weights.sum(), axis_name)
    else:
        state, counts = _average(whole, state, momentum, bias_correction)
        filled, total = (
            (counts > _TINY, counts.sum()) if bias_correction else (whole > 0, num_valid)
        )
        weights = _inverse(counts, min_count, strength)
        total_inverse = jnp.sum(counts * weights * filled)
    if normalizer == "bins":
        weights *= (num_valid / bins) ** strength
    else:
        weights *= total / jnp.maximum(total_inverse, _TINY)
    if density == "exact":
        table = jnp.zeros(bins + 2).at[index.ravel()].add(weights.ravel())[:bins]
        table = psum(table, axis_name) / jnp.maximum(seen, 1.0)
    else:
        table, weights = weights, jnp.append(weights, jnp.zeros(2))[index]
    mean_norm = total_norm / jnp.maximum(num_valid, 1.0)
    return weights, state, LossStats(mean_norm, num_valid, num_nonfinite, seen, table)


_TINY = 1e-12  # an average of fewer examples is an empty bin, whose inverse would overflow


def _average(
    seen: jax.Array, state: GHMState | None, momentum: float, bias_correction: bool
) -> tuple[GHMState | None, jax.Array]:
    """The next state, and the histogram to weigh by: S_j of equation 12."""
    if state is None:
        return None, seen
    average = momentum * state.counts + (1 - momentum) * seen
    step = state.step + 1
    if bias_correction:
        return GHMState(average, step), average / (1 - momentum ** step.astype(jnp.float32))
    average = jnp.where(seen > 0, average, state.counts)
    return GHMState(average, step), average


def _inverse(counts: jax.Array, min_count: float, strength: float) -> jax.Array:
    """D**-tau with D = max(counts, min_count); 1 where both are 0, as no example is there."""
    density = jnp.maximum(counts, min_count)
    density = jnp.where(density > _TINY, density, 1.0)
    return 1.0 / density if strength == 1.0 else density**-strength


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


def _check_settings(
    bins: int, momentum: float, normalizer: str, min_count: float, strength: float, density: str
) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if normalizer not in ("nonempty", "bins"):
        raise ValueError(f"normalizer must be 'nonempty' or 'bins', got {normalizer!r}")
    if not min_count >= 0.0:  # so that NaN is refused as well
        raise ValueError(f"min_count must not be negative, got {min_count}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    if density not in ("histogram", "exact"):
        raise ValueError(f"density must be 'histogram' or 'exact', got {density!r}")

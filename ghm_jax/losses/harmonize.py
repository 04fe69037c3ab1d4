"""Gradient harmonizing: weigh examples by the inverse density of their gradient norm.

Source: Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, equations 4-13.
"""

import types
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

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
    """f32[bins]. Weight of an example of each bin; None without a histogram."""


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
            float32; a value of exactly 1 belongs to the last bin.
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
        axis_name: replica axis over which the histogram is summed; None: each replica for itself.

    Returns:
        weights f32[...] (0 where masked), the new state (None if none was given), and statistics
        whose `plain_loss` is the mean gradient norm.

    Raises:
        ValueError: mask of another shape, or a setting out of range.
    """
    bins = bins if state is None else state.counts.shape[0]
    _check_settings(bins, momentum, normalizer, min_count, strength)
    norm = jax.lax.stop_gradient(gradient_norm).astype(jnp.float32)
    used = jnp.ones(norm.shape, bool) if mask is None else broadcast_mask(mask, norm.shape)
    finite = jnp.isfinite(norm)
    valid = used & finite
    norm = jnp.where(finite, norm, 0.0)
    # Clipped, because JAX drops an out-of-range scatter without a word.
    index = jnp.clip((norm * bins).astype(jnp.int32), 0, bins - 1)

    seen = count_bins(index, valid, bins).astype(jnp.float32)  # [bins]
    plain = jnp.sum(norm * valid)
    nonfinite = jnp.sum(used & ~finite, dtype=jnp.int32).astype(jnp.float32)
    if axis_name is not None:
        seen, plain, nonfinite = jax.lax.psum((seen, plain, nonfinite), axis_name)
    num_valid = seen.sum()

    if state is None:
        counts = seen
    elif bias_correction:
        state = GHMState(momentum * state.counts + (1 - momentum) * seen, state.step + 1)
        counts = state.counts / (1 - momentum ** state.step.astype(jnp.float32))
    else:
        average = momentum * state.counts + (1 - momentum) * seen
        state = GHMState(jnp.where(seen > 0, average, state.counts), state.step + 1)
        counts = state.counts

    density = jnp.maximum(counts, min_count)  # D
    safe = jnp.where(density > 0, density, 1.0)  # an empty bin has no example to weigh
    if normalizer == "bins":
        table = (num_valid / (bins * safe)) ** strength
    else:
        filled, total = (counts > 0, counts.sum()) if bias_correction else (seen > 0, num_valid)
        inverse = safe**-strength
        table = inverse * total / jnp.maximum(jnp.sum(counts * inverse * filled), _TINY)
    weights = jnp.where(valid, table[index], 0.0)
    stats = LossStats(plain / jnp.maximum(num_valid, 1.0), num_valid, nonfinite, seen, table)
    return weights, state, stats


_TINY = 1e-30


def count_bins(index: jax.Array, valid: jax.Array, bins: int) -> jax.Array:
    """i32[bins]: how many valid elements of `index` (i32[...], in [0, bins)) fall in each bin.

    Integers, because float32 stops counting at 2**24 and one 800x1344 image has 1.6e7 examples.
    """
    ones = valid.astype(jnp.int32).ravel()
    return jnp.zeros(bins, jnp.int32).at[index.ravel()].add(ones, mode="promise_in_bounds")


def broadcast_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask as bool[shape]. Only axes of size 1 are broadcast: a missing axis is an error."""
    if mask.ndim != len(shape) or any(m not in (1, s) for m, s in zip(mask.shape, shape)):  # noqa: B905 (ranks are equal)
        raise ValueError(
            f"mask must have the shape {shape} or 1 in place of an axis, got {mask.shape}"
        )
    return jnp.broadcast_to(mask.astype(bool), shape)


def _check_settings(
    bins: int, momentum: float, normalizer: str, min_count: float, strength: float
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

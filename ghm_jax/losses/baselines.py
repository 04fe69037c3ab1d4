"""The paper's baselines, with the interface of the GHM losses: (loss, state, stats).

The state is returned unchanged. As for GHM, the loss is this replica's share: `psum` it and its
gradients when `axis_name` is given.
"""

import jax
import jax.numpy as jnp
import optax

from ghm_jax.losses.arguments import read_floats, read_mask, read_positive, read_setting
from ghm_jax.losses.ghm import check_same_shape, dense_targets, sigmoid_cross_entropy
from ghm_jax.losses.harmonize import GHMState, LossStats, psum


def cross_entropy_loss(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Sigmoid cross-entropy, mean over all valid (position, class) pairs; see `ghm_c_loss`."""
    logits, dense, used = _class_inputs(logits, targets, mask)
    terms = sigmoid_cross_entropy(logits, dense)
    used, stats = _plain_stats(terms, used, axis_name)
    return _masked_sum(terms, used) / jnp.maximum(stats.num_valid, 1.0), state, stats


def focal_loss(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Focal loss, summed and divided by the number of positive targets (at least 1).

    `alpha` is the weight of positives, 1 - alpha that of the others; None: both 1. Other arguments
    as for `ghm_c_loss`; source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
    equation 5, and its section 4 for the division.
    """
    logits, dense, used = _class_inputs(logits, targets, mask)
    used, stats = _plain_stats(sigmoid_cross_entropy(logits, dense), used, axis_name)
    alpha = None if alpha is None else read_setting("alpha", alpha)
    gamma = read_setting("gamma", gamma)
    terms = optax.losses.sigmoid_focal_loss(logits, dense, alpha=alpha, gamma=gamma)
    positives = psum(_masked_sum(dense, used), axis_name)
    return _masked_sum(terms, used) / jnp.maximum(positives, 1.0), state, stats


def ohem_loss(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    negatives: float = 3.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Cross-entropy over the positives and the hardest negatives, their mean (OHEM, 1:3).

    Keeps `negatives` times as many negative (position, class) pairs as there are positive ones, at
    least one, those with the largest cross-entropy in the whole batch; all ties are kept.
    Arguments as for `ghm_c_loss`; a soft target above 0 is positive. Source: Shrivastava et al.,
    CVPR 2016, in the form that Lin et al., ICCV 2017, table 1, compares with ("OHEM 1:3").
    """
    logits, dense, used = _class_inputs(logits, targets, mask)
    terms = sigmoid_cross_entropy(logits, dense)
    used, stats = _plain_stats(terms, used, axis_name)
    positive = used & (dense > 0)
    count = jnp.sum(positive, dtype=jnp.int32).astype(jnp.float32)
    negatives = read_setting("negatives", negatives)
    num_negatives = jnp.maximum(negatives * psum(count, axis_name), 1.0)
    difficulty = jax.lax.stop_gradient(jnp.where(jnp.isnan(terms), jnp.inf, terms))
    difficulty = jnp.where(used & ~positive, difficulty, -1.0)
    kept = positive | (difficulty >= _kth_largest(difficulty, num_negatives, axis_name))
    num_kept = psum(jnp.sum(kept, dtype=jnp.int32).astype(jnp.float32), axis_name)
    return _masked_sum(terms, kept) / jnp.maximum(num_kept, 1.0), state, stats


def smooth_l1_loss(
    predictions: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    delta: float = 1 / 9,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Smooth L1 (equation 15), mean over the valid coordinates; arguments as for `ghm_r_loss`."""
    predictions, targets, used = _box_inputs(predictions, targets, mask)
    delta = read_positive("delta", delta)
    terms = optax.losses.huber_loss(predictions, targets, delta=delta) / delta
    used, stats = _plain_stats(terms, used, axis_name)
    return _masked_sum(terms, used) / jnp.maximum(stats.num_valid, 1.0), state, stats


def asl1_loss(
    predictions: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    mu: float = 0.02,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Authentic smooth L1 (equation 17), mean over the valid coordinates; GHM-R without weights.

    Arguments as for `ghm_r_loss`.
    """
    predictions, targets, used = _box_inputs(predictions, targets, mask)
    mu = read_positive("mu", mu)
    terms = jnp.hypot(predictions - targets, mu) - mu
    used, stats = _plain_stats(terms, used, axis_name)
    return _masked_sum(terms, used) / jnp.maximum(stats.num_valid, 1.0), state, stats


def _kth_largest(values: jax.Array, k: jax.Array, axis_name: str | None) -> jax.Array:
    """f32[]: the largest threshold that at least k of the values reach; 0 if fewer are above 0.

    Found bit by bit from the top, as non-negative floats are ordered like their bits: no sort, and
    replicas only have to add counts.
    """

    def refine(i: jax.Array, bits: jax.Array) -> jax.Array:
        tried = bits | (1 << (30 - i)).astype(jnp.int32)
        reached = values >= jax.lax.bitcast_convert_type(tried, jnp.float32)
        count = psum(jnp.sum(reached, dtype=jnp.int32).astype(jnp.float32), axis_name)
        return jnp.where(count >= k, tried, bits)

    bits = jax.lax.fori_loop(0, 31, refine, jnp.zeros((), jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _class_inputs(
    logits: jax.Array, targets: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Logits f32[..., K], targets f32[..., K], both 0 where masked, and the mask bool[..., K]."""
    logits = read_floats("logits", logits)
    dense, used = dense_targets(logits, targets, mask)
    return _zero_masked(logits, used), _zero_masked(dense, used), used


def _box_inputs(
    predictions: jax.Array, targets: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Predictions and targets as f32, both 0 where masked, and the mask in their shape."""
    predictions, targets = read_floats("predictions", predictions), read_floats("targets", targets)
    check_same_shape("predictions", predictions, targets)
    used = read_mask(mask, predictions.shape)
    return _zero_masked(predictions, used), _zero_masked(targets, used), used


def _masked_sum(values: jax.Array, used: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(used, values, 0.0))


def _zero_masked(values: jax.Array, used: jax.Array | None) -> jax.Array:
    """Values with 0 where masked: a NaN there would reach the gradient, 0 * NaN is NaN."""
    return values if used is None else jnp.where(used, values, 0.0)


def _plain_stats(
    terms: jax.Array, used: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, LossStats]:
    """The mask in full shape, and statistics without a histogram. NaN is not hidden."""
    terms = jax.lax.stop_gradient(terms)
    used = jnp.ones(terms.shape, bool) if used is None else used
    total = _masked_sum(terms, used)
    valid = jnp.sum(used, dtype=jnp.int32).astype(jnp.float32)
    nonfinite = jnp.sum(used & ~jnp.isfinite(terms), dtype=jnp.int32).astype(jnp.float32)
    total, valid, nonfinite = (psum(x, axis_name) for x in (total, valid, nonfinite))
    return used, LossStats(total / jnp.maximum(valid, 1.0), valid, nonfinite)

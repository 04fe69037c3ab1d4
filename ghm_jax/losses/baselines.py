"""The paper's baselines, with the interface of the GHM losses: (loss, state, stats).

They take several arrays in a tuple or list as well, see `ghm_jax.losses.ghm`.

The state is returned unchanged. As for GHM, the loss is this replica's share: `psum` it and its
gradients when `axis_name` is given.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghm_jax.losses.arguments import (
    read_floats,
    read_levels,
    read_mask,
    read_positive,
    read_setting,
)
from ghm_jax.losses.ghm import (
    check_same_shape,
    dense_targets,
    sigmoid_both,
    sigmoid_cross_entropy,
    sigmoid_error,
)
from ghm_jax.losses.harmonize import GHMState, LossStats, add, add_where, psum


def cross_entropy_loss(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Sigmoid cross-entropy, mean over all valid (position, class) pairs; see `ghm_c_loss`."""
    examples = _class_examples(logits, targets, mask)
    terms = [sigmoid_cross_entropy(x.values, x.targets) for x in examples]
    used, stats = _plain_stats(terms, examples, axis_name)
    return add_where(used, terms) / jnp.maximum(stats.num_valid, 1.0), state, stats


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
    examples = _class_examples(logits, targets, mask)
    plain = [sigmoid_cross_entropy(x.values, x.targets) for x in examples]
    used, stats = _plain_stats(plain, examples, axis_name)
    alpha = None if alpha is None else read_setting("alpha", alpha)
    gamma = read_setting("gamma", gamma)
    terms = [_sigmoid_focal(x.values, x.targets, gamma) for x in examples]
    if alpha is not None:
        balance = [alpha * x.targets + (1.0 - alpha) * (1.0 - x.targets) for x in examples]
        terms = [x * weight for x, weight in zip(terms, balance, strict=True)]
    positives = psum(add_where(used, [x.targets for x in examples]), axis_name)
    total = add_where(used, terms)
    return total / jnp.maximum(positives, 1.0), state, stats


@jax.custom_jvp
def _sigmoid_focal(logits: jax.Array, targets: jax.Array, gamma: Any) -> jax.Array:
    """m^gamma times the cross-entropy, elementwise, where m = p (1 - t) + (1 - p) t is what the
    prediction misses of the target."""
    p, q = sigmoid_both(logits)
    return (p * (1.0 - targets) + q * targets) ** gamma * sigmoid_cross_entropy(logits, targets)


@_sigmoid_focal.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The slope as one expression: differentiated by JAX, a TPU keeps an array for each factor, 9.6
    # instead of 0.7 GB for four images of 800x1344 and 80 classes. A setting has no gradient.
    logits, targets, gamma = primals
    p, q = sigmoid_both(logits)
    missed = p * (1.0 - targets) + q * targets
    power, plain = missed**gamma, sigmoid_cross_entropy(logits, targets)
    inverse = 1.0 / jnp.maximum(missed, 1e-30)  # finite also times gamma; p q is smaller still
    by_missed = gamma * inverse * plain  # times the power, for each unit of `missed`
    slope = power * (sigmoid_error(logits, targets) + by_missed * ((1.0 - 2.0 * targets) * p * q))
    by_target = power * (by_missed * (q - p) - logits)
    return power * plain, slope * tangents[0] + by_target * tangents[1]


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
    examples = _class_examples(logits, targets, mask)
    terms = [sigmoid_cross_entropy(x.values, x.targets) for x in examples]
    used, stats = _plain_stats(terms, examples, axis_name)
    positive = [u & (x.targets > 0) for u, x in zip(used, examples, strict=True)]
    negatives = read_setting("negatives", negatives)
    num_negatives = jnp.maximum(negatives * _count(positive, axis_name), 1.0)
    difficulty = [
        jnp.where(u & ~p, jax.lax.stop_gradient(jnp.where(jnp.isnan(x), jnp.inf, x)), -1.0)
        for x, u, p in zip(terms, used, positive, strict=True)
    ]
    least = _kth_largest(difficulty, num_negatives, axis_name)
    kept = [p | (x >= least) for p, x in zip(positive, difficulty, strict=True)]
    return add_where(kept, terms) / jnp.maximum(_count(kept, axis_name), 1.0), state, stats


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
    examples = _box_examples(predictions, targets, mask)
    delta = read_positive("delta", delta)
    huber = functools.partial(optax.losses.huber_loss, delta=delta)
    terms = [huber(x.values, x.targets) / delta for x in examples]
    used, stats = _plain_stats(terms, examples, axis_name)
    return add_where(used, terms) / jnp.maximum(stats.num_valid, 1.0), state, stats


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
    examples = _box_examples(predictions, targets, mask)
    mu = read_positive("mu", mu)
    terms = [jnp.hypot(x.values - x.targets, mu) - mu for x in examples]
    used, stats = _plain_stats(terms, examples, axis_name)
    return add_where(used, terms) / jnp.maximum(stats.num_valid, 1.0), state, stats


def _kth_largest(values: Sequence[jax.Array], k: jax.Array, axis_name: str | None) -> jax.Array:
    """f32[]: the largest threshold that at least k of the values reach; 0 if fewer are above 0.

    Found bit by bit from the top, as non-negative floats are ordered like their bits: no sort, and
    replicas only have to add counts.
    """

    def refine(i: jax.Array, bits: jax.Array) -> jax.Array:
        tried = bits | (1 << (30 - i)).astype(jnp.int32)
        least = jax.lax.bitcast_convert_type(tried, jnp.float32)
        count = _count([x >= least for x in values], axis_name)
        return jnp.where(count >= k, tried, bits)

    bits = jax.lax.fori_loop(0, 31, refine, jnp.zeros((), jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _count(masks: Sequence[jax.Array], axis_name: str | None) -> jax.Array:
    """How many elements are True, f32[]; counted in integers on each replica."""
    count = add(jnp.sum(mask, dtype=jnp.int32) for mask in masks)
    return psum(count.astype(jnp.float32), axis_name)


class _Examples(NamedTuple):
    """The examples of one array, [...]; values and targets are 0 where they are masked: a NaN there
    would reach the gradient, 0 * NaN is NaN."""

    values: jax.Array
    targets: jax.Array
    used: jax.Array
    """bool."""


def _class_examples(logits: Any, targets: Any, mask: Any) -> list[_Examples]:
    """Logits f32[..., K] and targets f32[..., K] of each array."""
    examples = []
    for logits_of, *others in read_levels(logits, targets, mask):
        values = read_floats("logits", logits_of)
        examples.append(_zero_masked(values, *dense_targets(values, *others)))
    return examples


def _box_examples(predictions: Any, targets: Any, mask: Any) -> list[_Examples]:
    """Predictions and targets of each array, f32."""
    examples = []
    for values, wanted, mask_of in read_levels(predictions, targets, mask):
        values, wanted = read_floats("predictions", values), read_floats("targets", wanted)
        check_same_shape("predictions", values, wanted)
        examples.append(_zero_masked(values, wanted, read_mask(mask_of, values.shape)))
    return examples


def _zero_masked(values: jax.Array, targets: jax.Array, used: jax.Array | None) -> _Examples:
    if used is None:
        return _Examples(values, targets, jnp.ones(values.shape, bool))
    return _Examples(jnp.where(used, values, 0.0), jnp.where(used, targets, 0.0), used)


def _plain_stats(
    terms: Sequence[jax.Array], examples: Sequence[_Examples], axis_name: str | None
) -> tuple[list[jax.Array], LossStats]:
    """The masks, and statistics without a histogram. NaN is not hidden."""
    terms, used = [jax.lax.stop_gradient(x) for x in terms], [x.used for x in examples]
    total, valid = psum(add_where(used, terms), axis_name), _count(used, axis_name)
    broken = [u & ~jnp.isfinite(x) for x, u in zip(terms, used, strict=True)]
    return used, LossStats(total / jnp.maximum(valid, 1.0), valid, _count(broken, axis_name))

"""The gradient-harmonized losses: GHM-C for class scores, GHM-R for box deltas.

Each returns (loss, state, stats). The loss is this replica's sum of weighted terms over the number
of examples of ALL replicas when `axis_name` is given: `jax.lax.psum` the loss and its gradients
over that axis. Weights are constants of the gradient; nothing flows through the histogram.

The keywords from `bins` to `density` are the fields of `Harmonizing`, which documents them:
`**settings` passes all of them, `**REFERENCE` selects the published code's behaviour. `state`,
`batch_counts` and `axis_name` are those of `harmonize`. Arrays may be JAX's, NumPy's or nested
lists. A mask of numbers counts what is above 0, as label weights do in the published code.

Where a network gives several arrays, such as one per pyramid level, all losses but
`ghm_softmax_loss` take them in a tuple or list, with targets and mask likewise: their examples
count together, as if concatenated, but nothing is.

Values that have no meaning raise ValueError if they are known and count. Under `jax.jit` they are
not known, and not checked: a class index without a meaning is background there, a dense target
outside [0, 1] is computed with.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.harmonizing import Density, Harmonizing, Normalizer
from ghm_jax.losses.arguments import (
    Array,
    check_fractions,
    read_array,
    read_class_indices,
    read_floats,
    read_levels,
    read_mask,
    read_positive,
)
from ghm_jax.losses.harmonize import GHMState, LossStats, add_where, psum, weigh

BACKGROUND = -1
"""Class index of a position that has no class."""
IGNORE = -2
"""Class index of a position that is ignored."""


def ghm_c_loss(
    logits: jax.Array,
    targets: jax.Array,
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
    """Harmonized sigmoid cross-entropy; every (position, class) pair is an example.

    Args:
        logits: float[..., K], before the sigmoid.
        targets: numbers [..., K] in [0, 1], or int[...] class indices, BACKGROUND (-1) or IGNORE
            (-2). In an unsigned type every number is a class.
        mask: bool or 0/1, shape of the logits or 1 in place of an axis; None: all valid.
        state: moving histogram (`init_ghm_state`); None: this batch alone.
        batch_counts: histogram of the whole batch, if these are the examples of a microbatch.
        axis_name: replica axis to count over.

    Returns:
        loss f32[] (nats per example), new state, statistics.

    Raises:
        ValueError: shapes that differ (they are never broadcast), or a setting out of range.

    Source: equations 1-13. The gradient is w (p - p*) / N.

    Examples:
        Class 1, background, and a position that is ignored, for two classes.

        >>> loss, _, stats = ghm_c_loss(jnp.zeros((3, 2)), jnp.array([1, -1, -2]))
        >>> f"{loss:.4f} of {stats.num_valid:.0f} examples"
        '0.6931 of 4 examples'
    """
    settings = Harmonizing(
        bins=bins, momentum=momentum, normalizer=normalizer, bias_correction=bias_correction,
        min_count=min_count, strength=strength, density=density,
    )  # fmt: skip
    examples = [_class_examples(*level) for level in read_levels(logits, targets, mask)]
    return _weighted_mean(examples, state, settings, batch_counts, axis_name)


def ghm_r_loss(
    predictions: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    state: GHMState | None = None,
    *,
    mu: float = 0.02,
    bins: int = 30,
    momentum: float = 0.7,
    normalizer: Normalizer = "nonempty",
    bias_correction: bool = True,
    min_count: float = 10.0,
    strength: float = 1.0,
    density: Density = "histogram",
    batch_counts: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """Harmonized authentic smooth L1 (ASL1); every coordinate is an example.

    Args:
        predictions: float[..., 4] box deltas (any shape works).
        targets: float, same shape.
        mask: bool or 0/1, same shape or 1 in place of an axis; True for positive anchors.
        state: moving histogram; None: this batch alone.
        mu: ASL1 is quadratic below and linear above this error (equation 17). Errors far above it
            share the last bin: choose it by the errors that there are.
        bins: the published code has 10 here.
        batch_counts: histogram of the whole batch, if these are the examples of a microbatch.
        axis_name: replica axis to count over.

    Returns:
        loss f32[] (per coordinate), new state, statistics.

    Raises:
        ValueError: shapes that differ (they are never broadcast), or a setting out of range.

    Source: equations 17-19.
    """
    mu = read_positive("mu", mu)
    settings = Harmonizing(
        bins=bins, momentum=momentum, normalizer=normalizer, bias_correction=bias_correction,
        min_count=min_count, strength=strength, density=density,
    )  # fmt: skip
    examples = [_box_examples(*level, mu) for level in read_levels(predictions, targets, mask)]
    return _weighted_mean(examples, state, settings, batch_counts, axis_name)


def ghm_softmax_loss(
    logits: jax.Array,
    labels: jax.Array,
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
    """Harmonized softmax cross-entropy; the gradient norm of an example is 1 - p(label).

    Not in the paper, which has sigmoid scores only; 1 - p(label) is its gradient with respect to
    the label's own logit.

    Args:
        logits: float[..., K], before the softmax.
        labels: int[...] class indices below K; a negative label is ignored. One of K or more that
            is not known counts as not finite.
        mask: bool or 0/1 [...], shape of the labels or 1 in place of an axis; None: all valid.
        state: moving histogram; None: this batch alone.
        batch_counts: histogram of the whole batch, if these are the examples of a microbatch.
        axis_name: replica axis to count over.

    Returns:
        loss f32[] (nats per example), new state, statistics.

    Raises:
        ValueError: shapes that do not fit together, or a setting out of range.
    """
    logits, finite = _finite(read_floats("logits", logits))
    labels, used = _read_labels(labels, logits.shape, mask)
    log_probabilities = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    examples = [_Examples(-jnp.expm1(chosen), -chosen, finite.all(-1), used)]
    settings = Harmonizing(
        bins=bins, momentum=momentum, normalizer=normalizer, bias_correction=bias_correction,
        min_count=min_count, strength=strength, density=density,
    )  # fmt: skip
    return _weighted_mean(examples, state, settings, batch_counts, axis_name)


def _read_labels(labels: Any, shape: tuple[int, ...], mask: Any) -> tuple[jax.Array, jax.Array]:
    """Class indices i32[...] of logits of a shape [..., K], and where they count."""
    labels = read_array("labels", labels)
    if labels.shape != shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer) or not shape:
        raise ValueError(
            f"labels must be int{list(shape[:-1])}, got {labels.dtype}{list(labels.shape)}"
        )
    used = read_mask(mask, labels.shape)
    labels = read_class_indices("labels", labels, shape[-1], mask, lowest=None)
    return labels, labels >= 0 if used is None else used & (labels >= 0)


class _Examples(NamedTuple):
    """The examples of one array, [...]."""

    norm: jax.Array
    """f32, gradient norms."""
    terms: jax.Array
    """f32, losses without weights."""
    finite: jax.Array
    """bool, whether prediction and target are finite."""
    used: jax.Array | None
    """bool, the mask; None: all."""


def _class_examples(logits: Any, targets: Any, mask: Any) -> _Examples:
    logits = read_floats("logits", logits)
    dense, used = dense_targets(logits, targets, mask)
    return _Examples(
        norm=jnp.abs(sigmoid_error(logits, dense)),
        terms=sigmoid_cross_entropy(logits, dense),
        finite=jnp.isfinite(logits) & jnp.isfinite(dense),
        used=used,
    )


def _box_examples(predictions: Any, targets: Any, mask: Any, mu: Any) -> _Examples:
    predictions, targets = read_floats("predictions", predictions), read_floats("targets", targets)
    check_same_shape("predictions", predictions, targets)
    error, finite = _finite(predictions - targets)
    root = jnp.hypot(error, mu)  # the square of a wild error overflows
    used = read_mask(mask, error.shape)
    return _Examples(norm=jnp.abs(error) / root, terms=root - mu, finite=finite, used=used)


def _weighted_mean(
    examples: Sequence[_Examples],
    state: GHMState | None,
    settings: Harmonizing,
    batch_counts: jax.Array | None,
    axis_name: str | None,
) -> tuple[jax.Array, GHMState | None, LossStats]:
    """sum(weights * terms) / N, and statistics with the plain mean of the terms."""
    norms = [jnp.where(x.finite, x.norm, jnp.nan) for x in examples]  # NaN: left out and reported
    masks, terms = [x.used for x in examples], [x.terms for x in examples]
    weights, state, stats = weigh(norms, masks, state, settings, batch_counts, axis_name)
    count = jnp.maximum(stats.num_valid, 1.0)
    valid = [w > 0 for w in weights]
    plain = add_where(valid, [jax.lax.stop_gradient(x) for x in terms])
    loss = add_where(valid, [w * x for w, x in zip(weights, terms, strict=True)])
    return loss / count, state, stats._replace(plain_loss=psum(plain, axis_name) / count)


def _finite(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values with 0 in place of NaN and infinity, and where they were finite.

    Replaced before any arithmetic: a zero weight would not stop a NaN, 0 * NaN is NaN.
    """
    finite = jnp.isfinite(values)
    return jnp.where(finite, values, 0.0), finite


@jax.custom_jvp
def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Elementwise -t log p - (1 - t) log(1 - p) with p = sigmoid(logits), exact in both tails."""
    return jnp.maximum(logits, 0.0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


@sigmoid_cross_entropy.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # p - t for every logit; differentiating maximum and abs would give -t at exactly 0.
    logits, targets = primals
    value = sigmoid_cross_entropy(logits, targets)
    return value, sigmoid_error(logits, targets) * tangents[0] - logits * tangents[1]


def sigmoid_error(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """p - t elementwise, the gradient of the cross-entropy (equation 2), exact in both tails.

    Computed as (1 - t) p - t (1 - p), since p rounds to 1 for logits of 17 or more. NaN becomes 0.
    """
    p, q = sigmoid_both(logits)
    error = (1.0 - targets) * p - targets * q
    return jnp.where(jnp.isfinite(error), error, 0.0)  # or 0 * NaN would reach the gradient


def sigmoid_both(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """p = sigmoid(logits) and 1 - p, each exact where it is small."""
    tail = jnp.exp(-jnp.abs(logits))
    larger = 1.0 / (1.0 + tail)
    upper = logits >= 0
    return jnp.where(upper, larger, tail * larger), jnp.where(upper, tail * larger, larger)


def dense_targets(logits: jax.Array, targets: Any, mask: Any) -> tuple[jax.Array, jax.Array | None]:
    """Targets f32[..., K] and the mask bool[..., K] from either form of classification targets.

    XLA fuses the comparison with the class index, so no one-hot array is written to memory.
    """
    targets = read_array("targets", targets)
    used = read_mask(mask, logits.shape)
    of_classes = logits.ndim > 0 and targets.shape == logits.shape[:-1]
    if of_classes and jnp.issubdtype(targets.dtype, jnp.integer):
        num_classes = logits.shape[-1]
        index = read_class_indices("targets", targets, num_classes, mask, lowest=IGNORE)
        classes = jnp.arange(num_classes, dtype=jnp.int32)
        dense = index[..., None] == classes.reshape((1,) * index.ndim + (-1,))
        kept = jnp.broadcast_to(index[..., None] != IGNORE, logits.shape)
        return dense.astype(jnp.float32), kept if used is None else used & kept
    check_same_shape("logits", logits, targets)
    check_fractions("targets", targets, mask, "leave examples out with `mask`")
    return read_floats("targets", targets), used


def check_same_shape(name: str, values: Array, targets: Array) -> None:
    if values.shape != targets.shape:
        raise ValueError(
            f"{name} and targets must have one shape, got {values.shape} and {targets.shape}"
        )

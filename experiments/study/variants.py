"""Changes of GHM-C that the study tries, as losses of a config.

    --loss.classification experiments.study.variants:smoothed

All have the interface of `ghm_jax.losses.focal_loss` for targets that are class indices; the moving
histogram has as many bins as the docstring says (`loss.ghm_c.bins`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghm_jax.distributed.devices import split_batch
from ghm_jax.harmonizing import Harmonizing
from ghm_jax.losses import IGNORE, GHMState, LossStats, ghm_c_loss

BINS = 30
FLOOR = Harmonizing(bins=BINS, min_count=100.0)
NO_FLOOR = Harmonizing(bins=BINS, min_count=0.0)

_ghm_c: Callable[..., Any] = ghm_c_loss  # whose types are those of a single array

Levels = Sequence[jax.Array]
Result = tuple[jax.Array, GHMState, LossStats]


def floor_of_positives(
    logits: Levels, classes: Levels, mask: None, state: GHMState, *, axis_name: str | None = None
) -> Result:
    """The floor is the number of positive anchors in the batch; 30 bins.

    A fixed floor suits one batch size and one data set. A bin that holds fewer examples than there
    are positive ones is of single objects.
    """
    positives = _num_positive(classes, axis_name)
    settings = {**FLOOR, "min_count": jnp.maximum(positives, 1.0)}
    return _ghm_c(logits, classes, mask, state, axis_name=axis_name, **settings)


def smoothed(
    logits: Levels, classes: Levels, mask: None, state: GHMState, *, axis_name: str | None = None
) -> Result:
    """No floor, but the histogram is smoothed over five bins; 30 bins.

    A bin with a handful of examples borrows from its neighbours instead of being cut off.
    """
    _, _, stats = _ghm_c(logits, classes, mask, None, axis_name=axis_name, **NO_FLOOR)
    counts = jnp.convolve(jnp.pad(stats.counts, 2, "symmetric"), _KERNEL, "valid")
    settings = {**NO_FLOOR, "batch_counts": counts}
    return _ghm_c(logits, classes, mask, state, axis_name=axis_name, **settings)


_KERNEL = np.array([1, 2, 3, 2, 1], np.float32) / 9


def apart(
    logits: Levels, classes: Levels, mask: None, state: GHMState, *, axis_name: str | None = None
) -> Result:
    """Positive and negative examples have histograms and means of their own; 60 bins.

    In one histogram, a positive example that the network finds easy shares its bin with thousands
    of easy negatives, and its weight.
    """
    del mask
    num_classes = logits[0].shape[-1]
    positive = [jax.nn.one_hot(x, num_classes, dtype=bool) for x in classes]
    used = [(x != IGNORE)[..., None] for x in classes]
    negative = [~x & valid for x, valid in zip(positive, used, strict=True)]
    targets = [x.astype(jnp.float32) for x in positive]
    results = [
        _ghm_c(logits, targets, chosen, half, axis_name=axis_name, **FLOOR)
        for chosen, half in zip((positive, negative), _split(state, 2), strict=True)
    ]
    return _joined(jax.tree.map(lambda *x: jnp.stack(x), *results))


def falling(
    logits: Levels, classes: Levels, mask: None, state: GHMState, *, axis_name: str | None = None
) -> Result:
    """The strength falls from 1 to 1/2 in the first thousand steps; 30 bins.

    At first easy negatives drown everything else. Later the hard bins are full of examples that
    nobody could get right.
    """
    strength = 0.5 + 0.5 * jnp.exp(-state.step.astype(jnp.float32) / 300)
    settings = {**FLOOR, "strength": strength}
    return _ghm_c(logits, classes, mask, state, axis_name=axis_name, **settings)


def per_object(
    logits: Levels, classes: Levels, mask: None, state: GHMState, *, axis_name: str | None = None
) -> Result:
    """Divided by the number of positive anchors, as focal loss, not of all examples; 30 bins.

    An object counts the same in a batch with many others and in one with few.
    """
    positives = jnp.maximum(_num_positive(classes, axis_name), 1.0)
    loss, state, stats = _ghm_c(logits, classes, mask, state, axis_name=axis_name, **FLOOR)
    return loss * stats.num_valid / positives, state, stats


def by_class(
    logits: Levels, classes: Levels, mask: None, state: GHMState, *, axis_name: str | None = None
) -> Result:
    """A histogram and a floor for each class; 30 bins for each.

    Gradient norms of a class that is learned late are counted among those of all others.
    """
    del mask
    num_classes = logits[0].shape[-1]
    settings = {**FLOOR, "min_count": FLOOR.min_count / num_classes, "axis_name": axis_name}

    def of_class(number: jax.Array, state: GHMState) -> Result:
        column = [jnp.take(level, number[None], axis=-1) for level in logits]
        targets = [(x == number).astype(jnp.float32)[..., None] for x in classes]
        used = [(x != IGNORE)[..., None] for x in classes]
        return _ghm_c(column, targets, used, state, **settings)

    states = _stack(_split(state, num_classes))
    return _joined(jax.vmap(of_class)(jnp.arange(num_classes), states))


def of_replicas(
    logits: Levels,
    classes: Levels,
    mask: None,
    state: GHMState,
    *,
    replicas: int,
    min_count: float,
    axis_name: str | None = None,
) -> Result:
    """As if each of several replicas counted its own images, as the published code does on several
    GPUs; 30 bins for each replica."""
    del mask

    def of_replica(logits: Any, classes: Any, state: Any) -> Result:
        settings = {**NO_FLOOR, "min_count": min_count / replicas, "axis_name": axis_name}
        return _ghm_c(logits, classes, None, state, **settings)

    logits, classes = (split_batch(list(levels), replicas) for levels in (logits, classes))
    return _joined(jax.vmap(of_replica)(logits, classes, _stack(_split(state, replicas))))


two_replicas = functools.partial(of_replicas, replicas=2, min_count=0.0)
four_replicas = functools.partial(of_replicas, replicas=4, min_count=0.0)
two_replicas_floor = functools.partial(of_replicas, replicas=2, min_count=100.0)
four_replicas_floor = functools.partial(of_replicas, replicas=4, min_count=100.0)


def _num_positive(classes: Levels, axis_name: str | None) -> jax.Array:
    """f32[]: positive anchors of the whole batch."""
    count = jnp.asarray(sum(jnp.sum(x >= 0) for x in classes), jnp.float32)
    return count if axis_name is None else jax.lax.psum(count, axis_name)


def _split(state: GHMState, parts: int) -> list[GHMState]:
    """Histograms that are kept as one."""
    return [GHMState(counts, state.step) for counts in state.counts.reshape(parts, -1)]


def _stack(states: Sequence[GHMState]) -> GHMState:
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


def _joined(results: Result) -> Result:
    """One result of several, stacked; without a histogram, as theirs are not of the same kind."""
    losses, states, stats = results
    state = GHMState(states.counts.ravel(), states.step[0])
    num_valid = stats.num_valid.sum()
    plain = (stats.plain_loss * stats.num_valid).sum() / jnp.maximum(num_valid, 1.0)
    return losses.mean(), state, LossStats(plain, num_valid, stats.num_nonfinite.sum())

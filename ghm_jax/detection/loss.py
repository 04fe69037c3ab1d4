"""The detector's loss: which functions of `ghm_jax.losses` a config asks for, and over what."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax import losses
from ghm_jax.config import Config, Loss
from ghm_jax.detection.levels import Levels, split_levels
from ghm_jax.detection.matching import Targets
from ghm_jax.exceptions import ConfigError
from ghm_jax.losses import GHMState, Harmonizing, LossStats

LossFunction = Callable[..., tuple[jax.Array, Any, LossStats]]


class GHMStates(NamedTuple):
    """Histograms of the two losses."""

    classification: GHMState
    box: GHMState


class LossTerms(NamedTuple):
    """This replica's share of the loss and of its two terms, f32[]: sum over the replicas."""

    total: jax.Array
    classification: jax.Array
    box: jax.Array


def init_ghm_states(config: Config) -> GHMStates:
    """The histograms before the first step."""
    bins = config.loss.ghm_c.bins, config.loss.ghm_r.bins
    return GHMStates(*map(losses.init_ghm_state, bins))


def detection_loss(
    logits: Levels,
    deltas: Levels,
    targets: Targets,
    states: GHMStates,
    *,
    config: Config,
    axis_name: str | None = None,
) -> tuple[LossTerms, GHMStates, tuple[LossStats, LossStats]]:
    """Classification loss of all anchors that are not ignored, box loss of the positive ones.

    Args:
        logits: f32[b, A_l, K] of each pyramid level.
        deltas: f32[b, A_l, 4].
        targets: [b, A] and [b, A, 4], of all levels.
        states: histograms so far.
        config: the losses, their settings and weights.
        axis_name: replica axis, for histograms and counts.

    Returns:
        The loss, the next histograms, and statistics of the classification and the box loss.
    """
    classify, regress = loss_functions(config.loss)
    if config.loss.ghm_scope == "level":  # other losses average over all levels, as published
        if config.loss.classification == "ghm_c":
            classify = _by_level(classify)
        if config.loss.box == "ghm_r":
            regress = _by_level(regress)
    sizes = [level.shape[1] for level in logits]
    classes, wanted = (split_levels(x, sizes) for x in targets)
    positive = tuple((x >= 0)[..., None] for x in classes)
    with jax.named_scope("classification_loss"):
        loss_class, state_class, stats_class = classify(
            logits, classes, None, states.classification, axis_name=axis_name
        )
    with jax.named_scope("box_loss"):
        loss_box, state_box, stats_box = regress(
            deltas, wanted, positive, states.box, axis_name=axis_name
        )
    weight, box_weight = loss_weights(config.loss)
    total = weight * loss_class + box_weight * loss_box
    terms = LossTerms(total, loss_class, loss_box)
    return terms, GHMStates(state_class, state_box), (stats_class, stats_box)


FIVE_CALLS = 4.0
"""How much larger the gradient of a call per pyramid level is than that of one call over all five.

Each call has a mean of its own, and they share a moving histogram. Measured between 2.7 and 5.0 by
`experiments/gradient_scale.py`, see docs/losses.md.
"""


def loss_weights(loss: Loss) -> tuple[float, float]:
    """Weights of the classification and the box loss, as numbers."""
    calls = FIVE_CALLS if loss.ghm_scope == "batch" else 1.0
    weight, box_weight = loss.weight, loss.box_weight
    if weight == "published":
        weight = calls if loss.classification == "ghm_c" else 1.0
    if box_weight == "published":
        box_weight = 10.0 * calls if loss.box == "ghm_r" else 4.0
    return weight, box_weight


def loss_functions(loss: Loss) -> tuple[LossFunction, LossFunction]:
    """The classification and the box loss, with the interface of `ghm_jax.losses.focal_loss`.

    Raises:
        ConfigError: a function of the user's own that cannot be imported.
    """
    return _classification_loss(loss), _box_loss(loss)


def _classification_loss(loss: Loss) -> LossFunction:
    match loss.classification:
        case "focal":
            return losses.focal_loss
        case "ohem":
            return losses.ohem_loss
        case "cross_entropy":
            return losses.cross_entropy_loss
        case "ghm_c":
            return _harmonized(losses.ghm_c_loss, loss.ghm_c)
        case own:
            return _imported("loss.classification", own)


def _box_loss(loss: Loss) -> LossFunction:
    match loss.box:
        case "smooth_l1":
            return losses.smooth_l1_loss
        case "asl1":
            return functools.partial(losses.asl1_loss, mu=loss.mu)
        case "ghm_r":
            return _harmonized(functools.partial(losses.ghm_r_loss, mu=loss.mu), loss.ghm_r)
        case own:
            return _imported("loss.box", own)


def _imported(key: str, name: str) -> LossFunction:
    """The function of a `module:function`; a setting's key for the error."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # of whatever kind the module raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "fix it, or put the folder of the module on PYTHONPATH"
        raise ConfigError(key, f"{name} cannot be imported: {reason}", remedy) from error


def _harmonized(function: LossFunction, settings: Harmonizing) -> LossFunction:
    """A GHM loss with its settings."""
    harmonized = functools.partial(function, **settings)
    if settings.density == "histogram":
        return harmonized

    def exact(
        values: Levels, targets: Levels, mask: Levels | None, state: GHMState, **axis: Any
    ) -> tuple[jax.Array, GHMState, LossStats]:
        # The density of each batch alone: the state stays unchanged.
        result, _, stats = harmonized(values, targets, mask, None, **axis)
        return result, state, stats

    return exact


def _by_level(function: LossFunction) -> LossFunction:
    """As in the published code: one call per pyramid level, each with its own mean, the losses
    summed; all calls share one moving histogram, so a step updates it once per level."""

    def over_levels(
        values: Levels, targets: Levels, mask: Levels | None, state: GHMState, **axis: Any
    ) -> tuple[jax.Array, GHMState, LossStats]:
        total, all_stats, current = jnp.zeros((), jnp.float32), [], state
        for level in zip(values, targets, mask or [None] * len(values), strict=True):
            loss, current, stats = function(*level, current, **axis)
            total += loss
            all_stats.append(stats)
        return total, current, _merge(all_stats)

    return over_levels


def _merge(calls: list[LossStats]) -> LossStats:
    """Statistics of several calls as if of one; weights are means over the examples."""

    def mean(values: list[jax.Array], counts: list[jax.Array]) -> jax.Array:
        weighted = sum(v * n for v, n in zip(values, counts, strict=True))
        return jnp.asarray(weighted / jnp.maximum(sum(counts), 1.0))

    valid = [stats.num_valid for stats in calls]
    counts = [stats.counts for stats in calls if stats.counts is not None]
    weights = [stats.weights for stats in calls if stats.weights is not None]
    return LossStats(
        plain_loss=mean([stats.plain_loss for stats in calls], valid),
        num_valid=jnp.asarray(sum(valid)),
        num_nonfinite=jnp.asarray(sum(stats.num_nonfinite for stats in calls)),
        counts=jnp.asarray(sum(counts)) if counts else None,
        weights=mean(weights, counts) if counts else None,
    )

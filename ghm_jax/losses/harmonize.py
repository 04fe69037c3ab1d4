"""Gradient harmonizing: weights examples by the inverse density of their gradient norm.

Source: Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, equations 4-13.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.bounds import problems
from ghm_jax.harmonizing import Density, Harmonizing, Normalizer
from ghm_jax.losses.arguments import is_traced, known, read_array, read_floats, read_setting
from ghm_jax.losses.density import bin_index, count_bins, density_at, look_up, read_norm


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
        return self.counts / (1 - settings.momentum ** jnp.asarray(self.step).astype(jnp.float32))


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


def read_state(state: Any) -> GHMState | None:
    """A state in any form in which a checkpoint or JSON may give it back.

    Args:
        state: a GHMState, a mapping with `counts` and `step`, or a tuple or list of the two; of
            arrays, lists and Python numbers. None: None.

    Raises:
        ValueError: anything else.
    """
    if state is None:
        return None
    fields = None
    if isinstance(state, Mapping) and set(state) == set(GHMState._fields):
        fields = state["counts"], state["step"]
    elif isinstance(state, tuple | list) and len(state) == len(GHMState._fields):
        fields = state
    if fields is None:
        raise ValueError(
            "state must be a GHMState, a mapping of its `counts` and `step`, or the two in a "
            f"tuple or list, got a {type(state).__name__}; start with init_ghm_state(bins)"
        )
    counts, step = (
        read_array(f"state.{name}", x) for name, x in zip(GHMState._fields, fields, strict=True)
    )
    if counts.ndim != 1 or not counts.size:
        raise ValueError(f"state.counts must be f32[bins], got the shape {counts.shape}")
    if step.ndim or not jnp.issubdtype(step.dtype, jnp.integer):
        raise ValueError(f"state.step must be one integer, got {step.dtype}{list(step.shape)}")
    for name, values, limit in (("counts", counts, math.inf), ("step", step, 2**31)):
        numbers = known(values)
        if numbers is None or ((numbers >= 0) & (numbers < limit)).all():
            continue
        refused = numbers[~((numbers >= 0) & (numbers < limit))].flat[0]
        raise ValueError(f"state.{name} must be finite and not negative, got {refused}")
    return GHMState(read_floats("state.counts", counts), jnp.asarray(step).astype(jnp.int32))


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
        momentum, min_count, strength: may be traced, for a schedule; their bounds are not checked
            then. The bias correction takes the momentum of this call for that of all steps.
        state: average so far (`read_state` has its forms); its length overrides `bins`. None: this
            batch alone.
        batch_counts: f32[bins], the histogram of the whole batch, when this call sees one
            microbatch (gradient accumulation): the sum of `counts` over all of them, from a first
            pass. Pass the same state for every microbatch: each call returns the same new one.
        axis_name: replica axis over which the histogram is summed; None: one histogram per replica.

    Returns:
        weights f32[...] (0 where masked), the new state (None if none was given), and statistics
        whose `plain_loss` is the mean gradient norm.

    Raises:
        ValueError: mask of another shape, a setting or a norm that is known and out of range, or
            exact density with a state or `batch_counts`, which are histograms.

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
    norm, used = read_norm(gradient_norm, mask)
    (weights,), state, stats = weigh([norm], [used], state, settings, batch_counts, axis_name)
    return weights, state, stats


def weigh(
    norms: Sequence[jax.Array],
    used: Sequence[jax.Array | None],
    state: Any,
    settings: Harmonizing,
    batch_counts: jax.Array | None,
    axis_name: str | None,
) -> tuple[list[jax.Array], GHMState | None, LossStats]:
    """`harmonize` of the examples in several arrays, with one histogram and settings as one object:
    norms f32[...] and masks bool[...] to weights f32[...]."""
    state = read_state(state)
    if state is not None:
        settings = dataclasses.replace(settings, bins=state.counts.shape[0])
    settings = _read_settings(settings)
    exact, bins = settings.density == "exact", settings.bins
    if exact and not (state is None and batch_counts is None):
        raise ValueError("density='exact' has no histogram: state and batch_counts must be None")
    norms = [jax.lax.stop_gradient(norm) for norm in norms]
    indices = [bin_index(norm, mask, bins) for norm, mask in zip(norms, used, strict=True)]
    valid = [index < bins for index in indices]
    # Cast to float32 before the sum over the replicas: the counts of a pod overflow int32.
    seen = add(count_bins(index, bins + 2) for index in indices).astype(jnp.float32)
    seen = psum(seen, axis_name)
    seen, num_nonfinite = seen[:bins], seen[bins + 1]
    batch_counts = seen if batch_counts is None else read_floats("batch_counts", batch_counts)
    if batch_counts.shape != seen.shape:
        raise ValueError(f"batch_counts must have the shape {seen.shape}, got {batch_counts.shape}")
    num_valid = batch_counts.sum()

    if exact:
        weights = _exact_weights(_flat(norms), _flat(valid), num_valid, settings, axis_name)
        table = jnp.zeros(bins + 2, jnp.float32).at[_flat(indices)].add(weights)[:bins]
        table = psum(table, axis_name) / jnp.maximum(seen, 1.0)
        ends = list(itertools.accumulate(norm.size for norm in norms))
        of_arrays = jnp.split(weights, ends[:-1])
        weights = [x.reshape(norm.shape) for x, norm in zip(of_arrays, norms, strict=True)]
    else:
        table, state = _histogram_weights(batch_counts, state, settings)
        extended = jnp.append(table, jnp.zeros(2, jnp.float32))
        weights = [look_up(extended, index) for index in indices]
    total_norm = psum(add_where(valid, norms), axis_name)
    mean_norm = total_norm / jnp.maximum(num_valid, 1.0)
    return weights, state, LossStats(mean_norm, num_valid, num_nonfinite, seen, table)


def _read_settings(settings: Harmonizing) -> Harmonizing:
    """Settings as Python values within their bounds, or traced."""
    read = {
        field.name: read_setting(field.name, settings[field.name], type(field.default))
        for field in dataclasses.fields(settings)
    }
    known = {name: value for name, value in read.items() if not is_traced(value)}
    for name, problem in problems(Harmonizing(**known)):
        raise ValueError(f"{name}: {problem}")
    return Harmonizing(**read)


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
    of_filled = jnp.sum(counts * weights * filled.astype(jnp.float32))
    return _scale(weights, total, of_filled, num_valid, settings), state


def _exact_weights(
    norm: jax.Array,
    valid: jax.Array,
    num_valid: jax.Array,
    settings: Harmonizing,
    axis_name: str | None,
) -> jax.Array:
    """Weights f32[n] from the density at each example's gradient norm; 0 where not valid."""
    density = density_at(norm, valid, 1 / settings.bins, axis_name)
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
    if not is_traced(settings.strength) and settings.strength == 1.0:
        return 1.0 / density
    return density**-settings.strength


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


def _flat(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in arrays])


def add(values: Iterable[jax.Array]) -> jax.Array:
    """The sum of at least one value."""
    return functools.reduce(jnp.add, values)


def add_where(used: Iterable[jax.Array], values: Iterable[jax.Array]) -> jax.Array:
    """The sum of the values of several arrays where their masks are True, f32[]."""
    return add(jnp.sum(jnp.where(u, v, 0.0)) for u, v in zip(used, values, strict=True))


def psum(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum over the replicas of `axis_name`; None: x itself."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)

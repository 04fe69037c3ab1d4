"""Properties of the harmonized losses for every input, checked on inputs drawn by hypothesis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ghm_jax.losses import (
    REFERENCE,
    cross_entropy_loss,
    ghm_c_loss,
    ghm_r_loss,
    harmonize,
    init_ghm_state,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (40, 3)
AS_PRINTED = {"normalizer": "bins", "min_count": 0.0}
AS_PUBLISHED = dict(REFERENCE)

# Extreme and ordinary logits, and zero, where g is 1/2: an edge of 30 bins.
logits = arrays.arrays(
    np.float32,
    SHAPE,
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1e4, -1e4, 30.0, -30.0]), st.floats(-8, 8, width=32)
    ),
)
hard_targets = arrays.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 1.0]))
soft_targets = arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32))
masks = arrays.arrays(bool, SHAPE)

tries = functools.partial(settings, deadline=None, max_examples=60, derandomize=False)


@functools.cache
def compiled(loss=ghm_c_loss, **how):
    def run(values, targets, mask, state):
        def value(x):
            result, new, stats = loss(x, targets, mask, state, **how)
            return result, (result, new, stats)

        gradient, results = jax.grad(value, has_aux=True)(values)
        return results, gradient

    return jax.jit(run)


@functools.cache
def weights_of(**how):
    return jax.jit(functools.partial(harmonize, bins=30, **how))


def norm_of(x, t):
    """g as float32 has it: bins are decided by it."""
    return np.float32(jnp.abs(jax.nn.sigmoid(x) - t))


@tries()
@given(logits, hard_targets, masks, st.randoms(use_true_random=False))
def test_the_order_of_examples_does_not_matter(x, t, mask, random):
    order = np.array(random.sample(range(40), 40))
    (loss, new, stats), gradient = compiled()(x, t, mask, init_ghm_state(30))
    (other, new2, stats2), gradient2 = compiled()(
        x[order], t[order], mask[order], init_ghm_state(30)
    )
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    np.testing.assert_array_equal(new2.counts, new.counts)
    np.testing.assert_array_equal(stats2.weights, stats.weights)
    np.testing.assert_array_equal(gradient2, gradient[order])


@tries()
@given(logits, logits, hard_targets, masks)
def test_masked_examples_have_no_influence(x, other, t, mask):
    changed = np.where(mask, x, other)
    changed[~mask & (other > 3)] = np.nan
    results, gradient = compiled()(x, t, mask, init_ghm_state(30))
    results2, gradient2 = compiled()(changed, np.where(mask, t, 1 - t), mask, init_ghm_state(30))
    jax.tree.map(np.testing.assert_array_equal, results2, results)
    np.testing.assert_array_equal(gradient2, gradient)
    assert not np.any(gradient[~mask])


@tries()
@given(logits, soft_targets, masks)
def test_strength_0_is_cross_entropy(x, t, mask):
    (loss, *_), gradient = compiled(strength=0.0)(x, t, mask, None)
    (want, *_), slope = compiled(cross_entropy_loss)(x, t, mask, None)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)


@tries()
@given(logits, hard_targets, masks)
def test_a_batch_too_small_for_the_floor_is_cross_entropy(x, t, mask):
    (loss, *_), gradient = compiled(min_count=float(x.size + 1))(x, t, mask, None)
    (want, *_), slope = compiled(cross_entropy_loss)(x, t, mask, None)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)


@tries()
@given(arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)), masks)
def test_without_floor_and_at_full_strength_weights_follow_the_equations(norm, mask):
    seen = np.bincount(oracles.bin_of(norm, 30)[mask], minlength=30)
    for how, divisor in ((AS_PRINTED, 30), (AS_PUBLISHED, max((seen > 0).sum(), 1))):
        weights, _, _ = weights_of(**how)(norm, mask)
        of_bin = mask.sum() / (divisor * np.maximum(seen, 1))  # equation 10
        bins = oracles.bin_of(norm, 30)
        # Counts are certain unless a norm is near an edge between two bins.
        in_doubt = oracles.near_edge(norm, 30) & (norm > 0.001) & (norm < 0.999)
        if not (in_doubt & mask).any():
            np.testing.assert_allclose(weights[mask], of_bin[bins][mask], rtol=1e-5)


@tries()
@given(arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)), masks)
def test_weights_add_up_to_the_number_of_examples(norm, mask):
    for how in (AS_PUBLISHED, {"min_count": 0.0}, {"min_count": 7.0}, {"strength": 0.4}):
        weights, _, _ = weights_of(**how)(norm, mask)
        np.testing.assert_allclose(weights.sum(), mask.sum(), rtol=1e-5)
    weights, _, stats = weights_of(**AS_PRINTED)(norm, mask)
    filled = (np.asarray(stats.counts) > 0).sum()
    np.testing.assert_allclose(weights.sum(), mask.sum() * filled / 30, rtol=1e-5)


@tries()
@given(arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)), masks)
def test_repeating_the_batch_does_not_change_its_weights(norm, mask):
    for how in (AS_PUBLISHED, AS_PRINTED, {"min_count": 0.0, "density": "exact"}):
        once, _, _ = weights_of(**how)(norm, mask)
        twice, _, _ = weights_of(**how)(np.concatenate([norm] * 2), np.concatenate([mask] * 2))
        np.testing.assert_allclose(twice, np.concatenate([once] * 2), rtol=1e-5)


@tries()
@given(
    arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)),
    masks,
    st.floats(0.5, 200, width=32),
)
def test_the_floor_bounds_every_weight(norm, mask, min_count):
    weights, _, stats = weights_of(min_count=min_count)(norm, mask)
    counts = np.asarray(stats.counts)
    filled = np.minimum(1, counts / min_count).sum()  # a smooth number of filled bins
    if mask.any():
        assert weights.max() <= mask.sum() / (min_count * filled) * (1 + 1e-5)


@tries()
@given(logits, soft_targets, masks)
def test_the_gradient_is_weight_times_error_over_the_number(x, t, mask):
    (_, _, stats), gradient = compiled(**AS_PUBLISHED)(x, t, mask, init_ghm_state(30))
    p, q = oracles.sigmoid(x), oracles.sigmoid(-x)
    error = (1 - np.float64(t)) * p - t * q
    # The weight of each example from the statistics: none can flow through the histogram.
    index = np.clip((np.abs(error) * 30).astype(int), 0, 29)
    weight = np.asarray(stats.weights)[index] / max(mask.sum(), 1)
    want = weight * error
    sure = mask & ~oracles.near_edge(np.abs(error), 30)
    # p and t are rounded: where they are almost equal, few digits of their difference are left.
    allowed = 2e-5 * np.abs(want) + 4 * np.finfo(np.float32).eps * weight
    assert (np.abs(gradient - want) <= allowed)[sure].all()


@tries()
@given(logits, soft_targets, masks, st.sampled_from(["histogram", "exact"]))
def test_values_and_gradients_are_finite(x, t, mask, density):
    for how in (AS_PUBLISHED, AS_PRINTED, {}):
        (loss, _, stats), gradient = compiled(density=density, **how)(x, t, mask, None)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()
        assert stats.num_nonfinite == 0
        assert stats.num_valid == mask.sum()
        if not mask.any():
            assert loss == 0
            assert not gradient.any()


@tries()
@given(logits, hard_targets, masks, arrays.arrays(bool, SHAPE))
def test_nonfinite_logits_are_reported_and_do_not_spread(x, t, mask, broken):
    bad = np.where(broken, np.resize([np.nan, np.inf, -np.inf], SHAPE), x).astype(np.float32)
    (loss, new, stats), gradient = compiled()(bad, t, mask, init_ghm_state(30))
    (want, new2, _), slope = compiled()(x, t, mask & ~broken, init_ghm_state(30))
    assert stats.num_nonfinite == (mask & broken).sum()
    np.testing.assert_array_equal(loss, want)
    np.testing.assert_array_equal(new.counts, new2.counts)
    np.testing.assert_array_equal(gradient, slope)


@tries()
@given(
    arrays.arrays(np.float32, (40, 4), elements=st.floats(-100, 100, width=32)),
    arrays.arrays(bool, (40, 1)),
    st.sampled_from([0.9, 0.99]),
)
def test_the_first_steps_do_not_blow_up(errors, mask, momentum):
    how = {"momentum": momentum, "min_count": 0.0, "bins": 10}
    zeros = np.zeros((40, 4), np.float32)
    (alone, *_), _ = compiled(ghm_r_loss, min_count=0.0, bins=10)(errors, zeros, mask, None)
    (first, state, _), _ = compiled(ghm_r_loss, **how)(errors, zeros, mask, init_ghm_state(10))
    np.testing.assert_allclose(first, alone, rtol=1e-4)
    (second, *_), _ = compiled(ghm_r_loss, **how)(errors, zeros, mask, state)
    np.testing.assert_allclose(second, alone, rtol=1e-4)
    (published, *_), _ = compiled(ghm_r_loss, momentum=momentum, **REFERENCE)(
        errors, zeros, mask, init_ghm_state(10)
    )
    np.testing.assert_allclose(published, alone / (1 - momentum), rtol=1e-3)

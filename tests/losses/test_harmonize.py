"""Weights from a histogram of gradient norms; see `oracles` for the formulas in float64."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from ghm_jax.losses import REFERENCE, GHMState, harmonize, init_ghm_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (64, 20)


@functools.cache
def compiled(settings):
    return jax.jit(functools.partial(harmonize, **dict(settings)))


def jitted(**settings):
    """`harmonize` with these settings; compiling takes most of the time here, so only once."""
    return compiled(tuple(sorted(({"momentum": 0.75, "bins": 30} | settings).items())))


def draw(rng, steps: int = 1, bins: int = 30):
    """Norms piled up at 0 and thin elsewhere, and masks, for some steps."""
    norms = [
        oracles.draw_off_edges(lambda: rng.uniform(size=SHAPE) ** 6, np.asarray, bins)
        for _ in range(steps)
    ]
    return norms, [rng.uniform(size=SHAPE) < 0.8 for _ in range(steps)]


def run(norms, masks, bins, **settings):
    state = init_ghm_state(bins)
    for norm, mask in zip(norms, masks, strict=True):
        weights, state, stats = jitted(**settings)(norm, mask, state)
    return weights, state, stats


@pytest.mark.parametrize(
    ("bins", "settings"),
    [
        (30, {"momentum": 0.75}),
        (10, {"momentum": 0.7, "min_count": 3.0}),
        (30, {"momentum": 0.99, "strength": 0.5, "min_count": 0.0}),
        (10, {"momentum": 0.9, "normalizer": "bins", "strength": 0.75}),
    ],
)
def test_weights_follow_the_formula_over_several_steps(rng, bins, settings):
    norms, masks = draw(rng, 4)
    momentum = settings["momentum"]
    for step in (1, 2, 4):
        weights, state, stats = run(norms[:step], masks[:step], bins, **settings)
        want = oracles.weights_after(norms[:step], masks[:step], bins=bins, **settings)
        np.testing.assert_allclose(weights, want, rtol=2e-5)
        seen = [oracles.histogram(n, m, bins) for n, m in zip(norms[:step], masks[:step])]  # noqa: B905
        average = sum(
            (1 - momentum) * momentum ** (step - 1 - i) * counts for i, counts in enumerate(seen)
        )
        np.testing.assert_allclose(state.counts, average, rtol=1e-5)
        assert state.step == step
        np.testing.assert_array_equal(stats.counts, seen[-1])
        assert stats.num_valid == masks[step - 1].sum()
        mean_norm = norms[step - 1][masks[step - 1]].mean(dtype=np.float64)
        np.testing.assert_allclose(stats.plain_loss, mean_norm, rtol=1e-5)
        table = np.asarray(stats.weights)[oracles.bin_of(norms[step - 1], bins)]
        np.testing.assert_array_equal(weights, np.where(masks[step - 1], table, 0))


@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_reference_follows_the_published_code(rng, momentum):
    norms, masks = draw(rng, 4)
    # No example in the upper bins, whose averages then stay unchanged.
    norms[2] = oracles.draw_off_edges(lambda: 0.5 * rng.uniform(size=SHAPE) ** 6, np.asarray, 30)
    for step in (1, 3, 4):
        weights, state, _ = run(norms[:step], masks[:step], 30, momentum=momentum, **REFERENCE)
        want, moving = oracles.published_weights(
            norms[:step], masks[:step], bins=30, momentum=momentum
        )
        np.testing.assert_allclose(weights, want, rtol=1e-5)
        np.testing.assert_allclose(state.counts, moving, rtol=1e-5)


def test_without_state_only_this_batch_counts(rng):
    norms, masks = draw(rng)
    weights, state, _ = jitted()(norms[0], masks[0])
    assert state is None
    want = oracles.weights_after(norms, masks, bins=30, momentum=0.0)
    np.testing.assert_allclose(weights, want, rtol=1e-5)


def test_bins_are_closed_below_and_the_last_one_above():
    edges = np.arange(64, dtype=np.float32) / 64  # exact in float32
    below = np.nextafter(np.append(edges[1:], edges[1]), np.float32(0))
    one = np.ones(64, np.float32)
    for norm, want in [(edges, np.arange(64)), (below, [*range(63), 0]), (one, [63] * 64)]:
        _, _, stats = jitted(bins=64)(norm)
        np.testing.assert_array_equal(stats.counts, np.bincount(want, minlength=64))


def test_bins_of_half_precision_norms_are_decided_in_float32(rng):
    # 0.9961 is the largest bfloat16 below 1; times 300 it would round to 299 or 300 in bfloat16.
    norm = jnp.asarray(np.concatenate([rng.uniform(size=200), [0.9961]]), jnp.bfloat16)
    weights, _, stats = jitted(bins=300)(norm)
    assert weights.dtype == jnp.float32
    index = np.minimum(np.float64(norm) * 300, 299).astype(int)
    np.testing.assert_array_equal(stats.counts, np.bincount(index, minlength=300))


def test_mean_weight_over_the_averaged_histogram_is_one(rng):
    norms, masks = draw(rng, 3)
    for settings in ({}, {"min_count": 0.0}):
        _, state, stats = run(norms, masks, 30, momentum=0.75, **settings)
        mean = np.average(stats.weights, weights=np.float64(state.counts))
        np.testing.assert_allclose(mean, 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("bins", "settings"),
    [(1, {}), (30, {"strength": 0.0}), (30, {"min_count": 2000.0})],
    ids=["one bin", "strength 0", "no bin reaches the floor"],
)
def test_weights_are_one(rng, bins, settings):
    (norm,), (mask,) = draw(rng)
    weights, _, _ = jitted(**settings)(norm, mask, init_ghm_state(bins))
    np.testing.assert_allclose(weights, mask, rtol=1e-5)


@pytest.mark.parametrize("min_count", [1.0, 10.0])
def test_floor_bounds_the_weights(rng, min_count):
    (norm,), (mask,) = draw(rng)
    _, _, stats = jitted(min_count=min_count)(norm, mask)
    filled = np.minimum(np.float64(stats.counts) / min_count, 1).sum()
    bound = mask.sum() / (min_count * filled)
    assert 1 < np.max(stats.weights) <= bound * (1 + 1e-5)


def test_floor_makes_the_weights_continuous_where_a_bin_empties():
    norm, mask = np.full(SHAPE, 0.01, np.float32), np.ones(SHAPE, bool)

    def weight(rest: float, min_count: float) -> float:
        state = GHMState(jnp.array([1280.0, rest, *[0.0] * 28]), jnp.array(50))
        return float(jitted(min_count=min_count)(norm, mask, state)[0][0, 0])

    assert weight(1e-3, 10.0) == pytest.approx(weight(0.0, 10.0), rel=1e-3)
    assert weight(1e-3, 0.0) == pytest.approx(
        0.5 * weight(0.0, 0.0), rel=1e-3
    )  # why there is a floor


@pytest.mark.parametrize("remainder", [1e-45, 1e-39, 1e-30, 1e-13])
def test_a_bin_that_has_long_been_empty_does_not_change_other_weights(rng, remainder):
    (norm,), (mask,) = draw(rng)
    mask &= norm < 0.5
    state = GHMState(jnp.zeros(30).at[20].set(remainder), jnp.array(400))
    weights, _, stats = jitted(min_count=0.0)(norm, mask, state)
    want, _, _ = jitted(min_count=0.0)(norm, mask, GHMState(jnp.zeros(30), jnp.array(400)))
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    assert np.isfinite(stats.weights).all()


def test_the_first_weights_are_unbiased_unless_as_published(rng):
    norms, masks = draw(rng, 2)
    alone = oracles.weights_after(norms[:1], masks[:1], bins=30, momentum=0.0, min_count=0.0)
    first = run(norms[:1], masks[:1], 30, momentum=0.99, min_count=0.0)[0]
    np.testing.assert_allclose(first, alone, rtol=1e-4)
    published = run(norms[:1], masks[:1], 30, momentum=0.99, **REFERENCE)[0]
    np.testing.assert_allclose(published, alone * 100, rtol=1e-4)
    second = run(norms, masks, 30, momentum=0.99, min_count=0.0)[0]
    assert np.max(second) <= 2 * masks[1].sum()  # one example of two steps' in a bin, at most


def test_masking_equals_filtering(rng):
    (norm,), (mask,) = draw(rng)
    hidden = np.where(mask, norm, rng.choice([np.nan, np.inf, 0.5, -7], SHAPE)).astype(np.float32)
    weights, _, stats = jitted()(hidden, mask)
    want, _, want_stats = jitted()(norm[mask])
    np.testing.assert_allclose(weights[mask], want, rtol=1e-6)
    assert not np.any(weights[~mask])
    assert stats.num_nonfinite == 0
    np.testing.assert_array_equal(stats.counts, want_stats.counts)


def test_mask_may_be_numbers_and_have_axes_of_one(rng):
    (norm,), _ = draw(rng)
    rows = rng.uniform(size=(64, 1)) < 0.5
    want = jitted()(norm, np.broadcast_to(rows, SHAPE))[0]
    np.testing.assert_array_equal(jitted()(norm, rows)[0], want)
    np.testing.assert_array_equal(jitted()(norm, np.float32(rows))[0], want)


def test_an_empty_batch_does_not_change_later_weights(rng):
    norms, masks = draw(rng, 3)
    masks[0][:] = masks[1][:] = False
    for settings in ({"momentum": 0.75}, {"momentum": 0.75, **REFERENCE}):
        weights, state, stats = run(norms[:1], masks[:1], 30, **settings)
        assert not np.any(weights)
        assert stats.num_valid == 0
        assert np.isfinite(stats.plain_loss)
        assert np.isfinite(stats.weights).all()
        assert not np.any(state.counts)
    weights, _, _ = run(norms, masks, 30, momentum=0.75, min_count=0.0)
    alone = oracles.weights_after(norms[2:], masks[2:], bins=30, momentum=0.0, min_count=0.0)
    np.testing.assert_allclose(weights, alone, rtol=1e-5)


def test_nonfinite_norms_are_reported_and_excluded(rng):
    (norm,), (mask,) = draw(rng)
    mask[:3, 0] = True
    broken, rest = norm.copy(), mask.copy()
    broken[:3, 0] = np.nan, np.inf, -np.inf
    rest[:3, 0] = False
    weights, state, stats = jitted()(broken, mask, init_ghm_state(30))
    want, want_state, _ = jitted()(norm, rest, init_ghm_state(30))
    assert stats.num_nonfinite == 3
    assert stats.num_valid == rest.sum()
    np.testing.assert_array_equal(weights, want)
    np.testing.assert_array_equal(state.counts, want_state.counts)


def test_no_gradient_flows_through_the_weights(rng):
    (norm,), (mask,) = draw(rng)

    def total(norm):
        weights, state, stats = harmonize(norm, mask, init_ghm_state(30))
        return weights.sum() + state.counts.sum() + stats.plain_loss + stats.weights.sum()

    assert not np.any(jax.jit(jax.grad(total))(norm))


def test_replicas_share_one_histogram_only_with_an_axis_name(rng):
    (norm,), (mask,) = draw(rng)
    norm.sort(axis=0)  # so that replicas see different bins
    norm[oracles.near_edge(norm, 30)] = 0.05
    state = GHMState(jnp.arange(30.0), jnp.array(3))
    want_weights, want_state, want_stats = jitted()(norm, mask, state)

    def replicas(axis_name):
        function = functools.partial(harmonize, axis_name=axis_name)
        split = (norm.reshape(8, 8, 20), mask.reshape(8, 8, 20))
        return jax.pmap(function, "replica", in_axes=(0, 0, None))(*split, state)

    weights, new, stats = replicas("replica")
    np.testing.assert_allclose(weights.reshape(SHAPE), want_weights, rtol=1e-6)
    for got, want in [*zip(new, want_state, strict=True), *zip(stats, want_stats, strict=True)]:
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-6)
    weights, new, _ = replicas(None)
    assert not np.allclose(weights.reshape(SHAPE), want_weights, rtol=0.01)
    assert np.ptp(new.counts, axis=0).any()


def test_counts_of_a_pod_pass_2_to_the_31(monkeypatch):
    # Eight replicas that see 2**30 examples each, without holding them.
    of_a_replica = jnp.array([2**30, 5, 0, 0], jnp.int32)
    module = importlib.import_module("ghm_jax.losses.harmonize")  # the name is the function's too
    monkeypatch.setattr(module, "count_bins", lambda index, slots: of_a_replica)

    def call(norm):
        return harmonize(norm, bins=2, axis_name="i")[2]

    stats = jax.pmap(call, axis_name="i")(jnp.zeros((8, 1)))
    np.testing.assert_allclose(stats.counts[0], [2.0**33, 40])
    np.testing.assert_allclose(stats.num_valid[0], 2.0**33 + 40, rtol=1e-6)


@pytest.mark.parametrize("density", ["histogram", "exact"])
def test_transformations_of_jax_may_wrap_it(rng, density):
    norms, masks = draw(rng, 3)
    norms, masks = np.stack(norms), np.stack(masks)
    settings = {"density": density, "bins": 30}

    def one(norm, mask):
        return harmonize(norm, mask, **settings)[0]

    each = [one(norm, mask) for norm, mask in zip(norms, masks, strict=True)]
    np.testing.assert_allclose(jax.vmap(one)(norms, masks), each, rtol=1e-6)
    np.testing.assert_allclose(jax.lax.map(lambda x: one(*x), (norms, masks)), each, rtol=1e-6)
    if density == "histogram":

        def step(state, norm_and_mask):
            weights, state, _ = harmonize(*norm_and_mask, state)
            return state, weights

        state, weights = jax.lax.scan(step, init_ghm_state(30), (norms, masks))
        want, want_state, _ = run(norms, masks, 30)
        np.testing.assert_allclose(weights[-1], want, rtol=1e-6)
        np.testing.assert_allclose(state.counts, want_state.counts, rtol=1e-6)


@pytest.mark.parametrize("shape", [(20,), (64, 20, 1), (20, 64), (32, 20), (64,)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="mask must have the shape"):
        harmonize(jnp.zeros(SHAPE), jnp.ones(shape))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("momentum", value) for value in (-0.1, 1.0, float("nan"))],
        *[("strength", value) for value in (-0.1, 1.1, float("nan"))],
        *[("min_count", value) for value in (-1.0, float("nan"))],
        ("normalizer", "mean"),
        ("bins", 0),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        harmonize(jnp.zeros(3), **{setting: value})

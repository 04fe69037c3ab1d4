"""Gradient density: exact, and counted in bins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from ghm_jax.distributed.devices import REPLICA
from ghm_jax.losses import gradient_density, harmonize
from ghm_jax.losses.density import (
    bin_index,
    count_bins,
    count_by_comparing,
    count_by_scattering,
    look_up,
    look_up_by_comparing,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (64, 20)


def draw(rng):
    """Norms piled up at 0, some at both ends exactly, and a mask."""
    norm = np.float32(rng.uniform(size=SHAPE) ** 4)
    norm[0, :5], norm[1, :5] = 0.0, 1.0
    return norm, rng.uniform(size=SHAPE) < 0.8


@pytest.mark.parametrize("epsilon", [0.001, 1 / 30, 0.3, 1.0])
def test_exact_density_is_that_of_the_equations(rng, epsilon):
    norm, mask = draw(rng)
    density = jax.jit(functools.partial(gradient_density, epsilon=epsilon))(norm, mask)
    # A length near 0 or 1 is a difference of float32 numbers.
    np.testing.assert_allclose(density, oracles.exact_density(norm, mask, epsilon), rtol=1e-4)


def test_exact_density_of_evenly_spread_norms_is_their_number():
    norm = jnp.asarray((np.arange(10_000) + 0.5) / 10_000)
    density = gradient_density(norm, epsilon=0.05)
    np.testing.assert_allclose(density, 10_000, rtol=5e-3)  # at the ends of [0, 1] too


def test_replicas_share_the_exact_density(rng):
    norm, mask = draw(rng)
    expected = gradient_density(norm, mask, epsilon=0.1)
    split = [x.reshape(8, 8, 20) for x in (norm, mask)]
    density = jax.pmap(
        functools.partial(gradient_density, epsilon=0.1, axis_name=REPLICA), axis_name=REPLICA
    )(*split)
    np.testing.assert_allclose(density.reshape(SHAPE), expected, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, -0.1, 1.1, np.nan])
def test_epsilon_out_of_range_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        gradient_density(jnp.zeros(3), epsilon=epsilon)


@pytest.mark.parametrize("normalizer", ["nonempty", "bins"])
@pytest.mark.parametrize(("min_count", "strength"), [(0.0, 1.0), (10.0, 1.0), (5.0, 0.5)])
def test_exact_weights_are_the_formula_example_by_example(rng, normalizer, min_count, strength):
    norm, mask = draw(rng)
    settings = {"min_count": min_count, "strength": strength, "normalizer": normalizer}
    weights, state, stats = harmonize(norm, mask, bins=30, density="exact", **settings)
    assert state is None
    nearby = np.maximum(oracles.exact_density(norm, mask, 1 / 30) / 30, min_count)
    inverse = np.where(mask, np.where(mask, nearby, 1) ** -strength, 0)
    if normalizer == "bins":
        want = inverse * (mask.sum() / 30) ** strength
    else:
        want = inverse / inverse[mask].mean()
    np.testing.assert_allclose(weights, want, rtol=2e-4)
    bins = oracles.bin_of(norm, 30)
    means = [want[mask & (bins == j)].mean() for j in range(30) if (mask & (bins == j)).any()]
    filled = np.asarray(stats.counts) > 0
    np.testing.assert_allclose(stats.weights[filled], means, rtol=2e-4)


def test_the_histogram_approximates_the_exact_density(rng):
    # A smooth density that is far from level, and many examples: Table 2 of the paper finds
    # no difference between the two.
    norm = np.float32(rng.beta(1, 3, 200_000))
    exact, *_ = harmonize(norm, density="exact", normalizer="bins")
    counted, *_ = harmonize(norm, normalizer="bins")
    ratio = np.asarray(counted / exact)[norm < 0.8]
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() < 0.1


def test_exact_density_refuses_a_histogram():
    with pytest.raises(ValueError, match="exact"):
        harmonize(jnp.zeros(3), density="exact", batch_counts=jnp.ones(30))


def test_a_norm_on_an_edge_is_in_the_bin_above():
    for bins in (*range(1, 100), 255, 256, 1000):
        edges = np.arange(bins, dtype=np.float32) / np.float32(bins)  # as published
        index = jax.device_get(bin_index(edges, None, bins))
        np.testing.assert_array_equal(index, np.arange(bins))
        assert bin_index(jnp.ones(1), None, bins)[0] == bins - 1


def test_masked_and_nonfinite_norms_have_different_indices():
    norm = jnp.array([0.0, 0.5, jnp.nan, jnp.inf, jnp.nan])
    mask = jnp.array([True, False, True, True, False])
    np.testing.assert_array_equal(bin_index(norm, mask, 10), [0, 10, 11, 11, 10])


@pytest.mark.parametrize("count", [count_by_scattering, count_by_comparing, count_bins])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_every_way_of_counting_equals_bincount(rng, count, dtype):
    index = rng.integers(0, 7, (4, 250)).astype(dtype)
    counts = count(index, slots=8)
    np.testing.assert_array_equal(counts, np.bincount(index.ravel(), minlength=8))
    assert counts.dtype == jnp.int32


@pytest.mark.parametrize("look", [look_up, look_up_by_comparing])
@pytest.mark.parametrize("size", [1, 32, 300])
def test_every_way_of_looking_up_equals_indexing(rng, look, size):
    table = np.float32(rng.normal(size=size))
    index = rng.integers(0, size, (7, 30)).astype(np.uint8 if size < 256 else np.int32)
    np.testing.assert_array_equal(jax.jit(look)(table, index), table[index])


def test_counts_do_not_stop_at_2_to_the_24():
    size = 2**24 + 2**20
    counts = jax.jit(count_bins, static_argnums=1)(jnp.ones(size, jnp.uint8), 3)
    np.testing.assert_array_equal(counts, [0, size, 0])

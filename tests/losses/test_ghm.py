"""GHM-C, GHM-R and the softmax form: values, gradients and unusual input."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from ghm_jax.losses import (
    REFERENCE,
    GHMState,
    ghm_c_loss,
    ghm_r_loss,
    ghm_softmax_loss,
    init_ghm_state,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (64, 20)
LOSSES = {"c": ghm_c_loss, "r": ghm_r_loss, "softmax": ghm_softmax_loss}
BINS = {"c": 30, "r": 10, "softmax": 30}


@functools.cache  # compiling takes most of the time here
def differentiated(kind: str, **settings):
    """(values, targets, mask, state) -> ((loss, state, stats), gradient by the values)."""

    def function(values, *rest):
        loss, state, stats = LOSSES[kind](values, *rest, **settings)
        return loss, (loss, state, stats)

    def run(*args):
        gradient, results = jax.grad(function, has_aux=True)(*args)
        return results, gradient

    return jax.jit(run)


def norm_c(logits, targets):
    return np.abs(oracles.sigmoid(logits) - targets)


def norm_r(error, mu=0.02):
    return np.abs(error) / np.hypot(error, mu)


def softmax(logits):
    powers = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def draw_c(rng, hard: bool = True):
    """Logits, targets and mask like a detector's: few positives, most scores low."""
    if hard:
        targets = np.float32(rng.uniform(size=SHAPE) < 0.05)
    else:
        targets = np.float32(rng.uniform(size=SHAPE))
    logits = oracles.draw_off_edges(
        lambda: rng.normal(-3, 3, SHAPE), lambda x: norm_c(x, targets), bins=30
    )
    return logits, targets, rng.uniform(size=SHAPE) < 0.8


def draw_r(rng):
    targets = np.zeros(SHAPE, np.float32)  # so that the float32 error is exact
    errors = oracles.draw_off_edges(lambda: rng.normal(0, 0.1, SHAPE) ** 3 * 30, norm_r, bins=30)
    return errors, targets, rng.uniform(size=SHAPE) < 0.8


def split(array):
    return array.reshape(8, 8, *array.shape[1:])


GOLDEN_FILES = Path(__file__).parents[1] / "golden"  # see the README there
GOLDEN = [
    (kind, bins, momentum)
    for kind in "cr"
    for bins, momentum in [(10, 0.0), (10, 0.7), (10, 0.9), (30, 0.0), (30, 0.75)]
]


@pytest.mark.parametrize(("kind", "bins", "momentum"), GOLDEN)
def test_reference_gives_the_golden_numbers(kind, bins, momentum):
    golden = np.load(GOLDEN_FILES / f"ghm_{kind}_bins{bins}_mom{momentum}.npz")
    state = init_ghm_state(bins)
    run = differentiated(kind, momentum=momentum, **REFERENCE)
    for step in range(4):
        pred, target, mask = (golden[key][step] for key in ("pred", "target", "mask"))
        (loss, state, _), gradient = run(pred, target, mask, state)
        np.testing.assert_allclose(loss, golden["loss"][step], rtol=1e-5)
        np.testing.assert_allclose(gradient, golden["grad"][step], rtol=1e-5, atol=1e-9)
        if momentum:
            np.testing.assert_allclose(state.counts, golden["acc_sum"][step], rtol=1e-5)


def assert_ghm_c_equals_the_oracle(rng, hard, dtype=np.float32, steps=3):
    """Returns what the last step gave: ((loss, state, stats), gradient)."""
    history, state = [], init_ghm_state(30)
    for _ in range(steps):
        logits, targets, mask = draw_c(rng, hard)
        args = logits.astype(dtype), targets.astype(dtype), mask
        (loss, state, stats), gradient = differentiated("c")(*args, state)
        history.append((norm_c(logits, targets), mask))
        weights = oracles.weights_after(*zip(*history, strict=True), bins=30, momentum=0.75)
        terms = oracles.binary_cross_entropy(logits, targets)
        np.testing.assert_allclose(loss, (weights * terms).sum() / mask.sum(), rtol=1e-5)
        np.testing.assert_allclose(stats.plain_loss, terms[mask].mean(), rtol=1e-5)
        want = weights * (oracles.sigmoid(logits) - targets) / mask.sum()
        np.testing.assert_allclose(gradient, want, rtol=2e-5, atol=1e-9)
    return (loss, state, stats), gradient


@pytest.mark.parametrize("hard", [True, False], ids=["hard targets", "soft targets"])
def test_ghm_c_equals_the_oracle(rng, hard):
    assert_ghm_c_equals_the_oracle(rng, hard)


def assert_ghm_r_equals_the_oracle(rng, dtype=np.float32, steps=3):
    """As for GHM-C."""
    history, state = [], init_ghm_state(10)
    for _ in range(steps):
        errors, targets, mask = draw_r(rng)
        args = errors.astype(dtype), targets.astype(dtype), mask
        (loss, state, stats), gradient = differentiated("r")(*args, state)
        history.append((norm_r(errors), mask))
        weights = oracles.weights_after(*zip(*history, strict=True), bins=10, momentum=0.7)
        root = np.hypot(np.float64(errors), 0.02)
        np.testing.assert_allclose(loss, (weights * (root - 0.02)).sum() / mask.sum(), rtol=1e-5)
        np.testing.assert_allclose(stats.plain_loss, (root - 0.02)[mask].mean(), rtol=1e-5)
        np.testing.assert_allclose(gradient, weights * errors / root / mask.sum(), rtol=2e-5)
    return (loss, state, stats), gradient


def test_ghm_r_equals_the_oracle(rng):
    assert_ghm_r_equals_the_oracle(rng)


@pytest.mark.parametrize("kind", ["c", "r"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_options_on_number_types_change_nothing(rng, kind, dtype, number_types):
    if kind == "c":
        results, gradient = assert_ghm_c_equals_the_oracle(rng, hard=False, dtype=dtype, steps=2)
    else:
        results, gradient = assert_ghm_r_equals_the_oracle(rng, dtype, steps=2)
    assert_float32(*results)
    assert gradient.dtype == (dtype if number_types == "64-bit" else np.float32)


@pytest.mark.parametrize(("kind", "density"), [("c", "histogram"), ("r", "exact")])
@pytest.mark.usefixtures("number_types")
def test_types_are_as_documented_without_jit_whatever_the_options(rng, kind, density):
    state = init_ghm_state(BINS[kind]) if density == "histogram" else None
    results = LOSSES[kind](*rng.uniform(size=(2, 50)), None, state, density=density)
    assert_float32(*results)
    _, _, stats = results
    assert int(stats.num_valid) == 50
    np.testing.assert_allclose(np.average(stats.weights, weights=stats.counts), 1, rtol=1e-5)


def assert_float32(loss, state, stats):
    """Whatever the types of the input: only the number of steps is an integer."""
    assert {x.dtype for x in jax.tree.leaves((loss, stats))} == {np.dtype(np.float32)}
    if state is not None:
        assert (state.counts.dtype, state.step.dtype) == (np.float32, np.int32)


def test_ghm_softmax_equals_the_oracle(rng):
    labels = rng.integers(-1, 20, 64)
    rows = np.arange(64)

    def norm(logits):
        return 1 - softmax(logits)[rows, labels]

    logits = oracles.draw_off_edges(
        lambda: rng.normal(0, 3, SHAPE), lambda x: np.repeat(norm(x)[:, None], 20, 1), bins=30
    )
    mask = rng.uniform(size=64) < 0.8
    used = mask & (labels >= 0)
    (loss, _, stats), gradient = differentiated("softmax")(logits, labels, mask, init_ghm_state(30))
    weights = oracles.weights_after([norm(logits)], [used], bins=30, momentum=0.75)
    terms = -np.log(softmax(logits)[rows, labels])
    assert stats.num_valid == used.sum()
    np.testing.assert_allclose(loss, (weights * terms).sum() / used.sum(), rtol=1e-5)
    np.testing.assert_allclose(stats.plain_loss, terms[used].mean(), rtol=1e-5)
    slope = softmax(logits) - (labels[:, None] == np.arange(20))
    want = weights[:, None] * slope / used.sum()
    np.testing.assert_allclose(gradient, want, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize(
    "settings", [{"strength": 0.0}, {"min_count": 2000.0}], ids=["strength 0", "below the floor"]
)
def test_weights_of_one_give_plain_cross_entropy(rng, settings):
    logits, targets, mask = draw_c(rng)
    (loss, _, stats), gradient = differentiated("c", **settings)(logits, targets, mask, None)
    want = oracles.binary_cross_entropy(logits, targets)[mask].mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(stats.plain_loss, want, rtol=1e-5)
    slope = (oracles.sigmoid(logits) - targets) * mask / mask.sum()
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)


def test_gradient_is_that_of_the_weighted_loss_with_weights_held_fixed(rng):
    logits, targets, mask = draw_c(rng)
    (_, state, stats), gradient = differentiated("c")(logits, targets, mask, init_ghm_state(30))
    assert state.step == 1
    weights = np.float64(stats.weights)[oracles.bin_of(norm_c(logits, targets), 30)] * mask
    x, step = np.float64(logits), 1e-5

    def terms(x):
        return weights * oracles.binary_cross_entropy(x, targets) / mask.sum()

    slope = (terms(x + step) - terms(x - step)) / (2 * step)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-8)


def test_masking_equals_filtering_whatever_is_under_the_mask(rng):
    for kind, (values, targets, mask) in (("c", draw_c(rng, hard=False)), ("r", draw_r(rng))):
        state = init_ghm_state(BINS[kind])
        (want, want_state, _), slope = differentiated(kind)(values, targets, mask, state)
        junk = np.float32(rng.choice([np.nan, np.inf, -np.inf, 3.0], SHAPE))
        for hidden_values, hidden_targets in (
            (np.where(mask, values, junk), targets),
            (values, np.where(mask, targets, junk)),
        ):
            results, gradient = differentiated(kind)(hidden_values, hidden_targets, mask, state)
            assert results[0] == want
            np.testing.assert_array_equal(results[1].counts, want_state.counts)
            assert results[2].num_nonfinite == 0
            np.testing.assert_array_equal(gradient, slope)
        assert not np.any(slope[~mask])
        used = values[mask], targets[mask], np.ones(mask.sum(), bool)
        if kind == "c":
            (filtered, _, _), gradient = differentiated(kind)(*used, state)
            np.testing.assert_allclose(want, filtered, rtol=1e-5)
            np.testing.assert_allclose(slope[mask], gradient, rtol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_valid_gives_zero_and_no_gradient(rng, kind):
    values = np.float32(rng.normal(size=SHAPE))
    targets = rng.integers(0, 20, 64) if kind == "softmax" else np.zeros(SHAPE, np.float32)
    mask = np.zeros(targets.shape, bool)
    state = init_ghm_state(BINS[kind])
    (loss, _, stats), gradient = differentiated(kind)(values, targets, mask, state)
    assert loss == 0
    assert stats.plain_loss == 0
    assert not np.any(gradient)


def test_extreme_logits_are_exact():
    logits = np.zeros(SHAPE, np.float32)
    targets, mask = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool)
    logits[0, :6] = 1e4, 1e4, -1e4, -1e4, 0, 0
    targets[0, :6] = 0, 1, 0, 1, 0, 1
    mask[0, :6] = True
    plain = differentiated("c", strength=0.0)
    (loss, _, stats), gradient = plain(logits, targets, mask, None)
    np.testing.assert_allclose(loss, (2e4 + 2 * np.log(2)) / 6, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, :6] * 6, [1, 0, 0, -1, 0.5, -0.5], atol=1e-7)
    np.testing.assert_array_equal(stats.counts, [2, *[0] * 14, 2, *[0] * 13, 2])


def test_extreme_box_errors_stay_finite():
    errors = np.zeros(SHAPE, np.float32)
    errors[0, :5] = 1e-20, 1e4, -1e15, 1e25, -1e30
    args = errors, np.zeros(SHAPE, np.float32), np.ones(SHAPE, bool), init_ghm_state(10)
    (loss, _, stats), gradient = differentiated("r")(*args)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(stats.counts, [1276, *[0] * 8, 4])
    np.testing.assert_array_equal(np.sign(gradient[0, :5]), [1, 1, -1, 1, -1])


def test_nonfinite_values_are_counted_and_excluded(rng):
    for kind, (values, targets, mask) in (("c", draw_c(rng)), ("r", draw_r(rng))):
        mask[:4, 0] = True
        values[:3, 0] = np.nan, np.inf, -np.inf
        targets[3, 0] = np.nan
        state = init_ghm_state(BINS[kind])
        (loss, new, stats), gradient = differentiated(kind)(values, targets, mask, state)
        assert stats.num_nonfinite == 4
        mask[:4, 0] = False
        (want, want_new, _), slope = differentiated(kind)(values, targets, mask, state)
        assert np.isfinite(want)
        assert loss == want
        np.testing.assert_array_equal(new.counts, want_new.counts)
        np.testing.assert_array_equal(gradient, slope)


def test_nonfinite_softmax_rows_are_counted_and_excluded(rng):
    logits, labels = np.float32(rng.normal(size=SHAPE)), rng.integers(0, 20, 64)
    mask, state = np.ones(64, bool), init_ghm_state(30)
    logits[0, 0], logits[1, 19] = np.nan, np.inf
    (loss, _, stats), gradient = differentiated("softmax")(logits, labels, mask, state)
    assert stats.num_nonfinite == 2
    assert np.isfinite(loss)
    assert not np.any(gradient[:2])
    assert np.isfinite(gradient).all()


def test_class_indices_are_dense_targets_with_a_mask(rng):
    logits, _, mask = draw_c(rng)
    classes = rng.integers(-2, 20, 64)
    dense = np.float32(classes[:, None] == np.arange(20))
    kept = np.repeat(classes[:, None] != -2, 20, axis=1)
    state = init_ghm_state(30)
    for given, used in ((None, kept), (mask, mask & kept)):
        results, gradient = differentiated("c")(logits, classes, given, state)
        want, slope = differentiated("c")(logits, dense, used, state)
        jax.tree.map(np.testing.assert_array_equal, results, want)
        np.testing.assert_array_equal(gradient, slope)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_is_counted_and_summed_in_float32(rng, dtype):
    logits, targets, mask = draw_c(rng)
    state = init_ghm_state(30)
    half = jnp.asarray(logits, dtype)
    (loss, new, _), gradient = differentiated("c")(half, jnp.asarray(targets, dtype), mask, state)
    want, slope = differentiated("c")(half.astype(jnp.float32), targets, mask, state)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(loss, want[0])
    np.testing.assert_array_equal(new.counts, want[1].counts)
    np.testing.assert_allclose(np.float32(gradient), slope, rtol=0.01, atol=1e-7)


def test_jit_equals_eager(rng):
    logits, targets, mask = draw_c(rng)
    state = init_ghm_state(30)
    got, _ = differentiated("c")(logits, targets, mask, state)
    want = ghm_c_loss(logits, targets, mask, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


@pytest.mark.parametrize("kind", LOSSES)
def test_replicas_equal_one_device_only_with_an_axis_name(rng, kind):
    if kind == "softmax":
        values, targets = np.float32(rng.normal(0, 3, SHAPE)), rng.integers(-1, 20, 64)
        mask = rng.uniform(size=64) < 0.8
    else:
        values, targets, mask = draw_r(rng) if kind == "r" else draw_c(rng)
    mask[:12] = False  # replicas of different weight, and one without any example
    state = GHMState(jnp.arange(float(BINS[kind])), jnp.array(3))
    want, slope = differentiated(kind)(values, targets, mask, state)

    def replicas(axis_name):
        @functools.partial(jax.pmap, axis_name="replica", in_axes=(0, 0, 0, None))
        def run(*args):
            (loss, new, stats), gradient = differentiated(kind, axis_name=axis_name)(*args)
            return (jax.lax.psum(loss, "replica"), new, stats), gradient

        return run(split(values), split(targets), split(mask), state)

    results, gradient = replicas("replica")
    np.testing.assert_allclose(gradient.reshape(SHAPE), slope, rtol=1e-5, atol=1e-9)
    for got, expected in zip(jax.tree.leaves(results), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-5)
    if kind == "c":
        results, _ = replicas(None)
        assert not np.allclose(results[0], want[0], rtol=0.01)


ZEROS = jnp.zeros((6, 4))


@pytest.mark.parametrize(
    ("loss", "args"),
    [
        (ghm_c_loss, (ZEROS, jnp.zeros((6, 1)))),
        (ghm_c_loss, (ZEROS, jnp.zeros(4))),
        (ghm_c_loss, (ZEROS, jnp.zeros(6))),  # float: not class indices
        (ghm_c_loss, (ZEROS, jnp.zeros(4, int))),
        (ghm_c_loss, (ZEROS, ZEROS, jnp.ones(6))),
        (ghm_c_loss, (ZEROS, jnp.zeros(6, int), jnp.ones(6))),
        (ghm_r_loss, (ZEROS, jnp.zeros((1, 4)))),
        (ghm_r_loss, (ZEROS, ZEROS, jnp.ones(6))),
        (ghm_softmax_loss, (ZEROS, ZEROS)),
        (ghm_softmax_loss, (ZEROS, jnp.zeros(6))),
        (ghm_softmax_loss, (ZEROS, jnp.zeros((6, 1), int))),
        (ghm_softmax_loss, (ZEROS, jnp.zeros(6, int), jnp.ones((6, 4)))),
    ],
)
def test_shapes_are_never_broadcast(loss, args):
    with pytest.raises(ValueError, match=r"must (have|be)"):
        loss(*args)


@pytest.mark.parametrize("mu", [0.0, -1.0, float("nan")])
def test_mu_must_be_positive(mu):
    with pytest.raises(ValueError, match="mu must be positive"):
        ghm_r_loss(ZEROS, ZEROS, mu=mu)

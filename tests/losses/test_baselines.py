"""Cross-entropy, OHEM, focal loss, smooth L1 and ASL1 against float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from ghm_jax.losses import (
    asl1_loss,
    cross_entropy_loss,
    focal_loss,
    init_ghm_state,
    ohem_loss,
    smooth_l1_loss,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (64, 20)
BOX_LOSSES = {"smooth_l1": smooth_l1_loss, "asl1": asl1_loss}
LOSSES = {
    "cross_entropy": cross_entropy_loss,
    "focal": focal_loss,
    "ohem": ohem_loss,
    **BOX_LOSSES,
}


@functools.cache
def differentiated(name: str, axis_name: str | None = None):
    def function(values, *rest):
        loss, _, stats = LOSSES[name](values, *rest, axis_name=axis_name)
        return loss, stats

    return jax.jit(jax.value_and_grad(function, has_aux=True))


def draw(rng, name: str):
    if name in BOX_LOSSES:
        values, targets = rng.normal(0, 0.2, (2, *SHAPE)).astype(np.float32)
    else:
        values = np.float32(rng.normal(-3, 3, SHAPE))
        targets = np.float32(rng.uniform(size=SHAPE) < 0.05)
    return values, targets, rng.uniform(size=SHAPE) < 0.8


def oracle(name: str, values, targets, mask) -> float:
    x, t = np.float64(values), np.float64(targets)
    if name == "smooth_l1":  # equation 15
        d, delta = np.abs(x - t), 1 / 9
        return np.where(d <= delta, d**2 / (2 * delta), d - delta / 2)[mask].mean()
    if name == "asl1":  # equation 17
        return (np.sqrt((x - t) ** 2 + 0.02**2) - 0.02)[mask].mean()
    if name == "ohem":
        terms = oracles.binary_cross_entropy(x, t)
        positive, negative = terms[mask & (t == 1)], np.sort(terms[mask & (t == 0)])
        return np.concatenate([positive, negative[-max(3 * positive.size, 1) :]]).mean()
    if name == "cross_entropy":
        return oracles.binary_cross_entropy(x, t)[mask].mean()
    p = oracles.sigmoid(x)
    hit = 0.25 * (1 - p) ** 2 * np.logaddexp(0, -x)
    miss = 0.75 * p**2 * np.logaddexp(0, x)
    return np.where(t == 1, hit, miss)[mask].sum() / max(t[mask].sum(), 1)


def assert_equals_the_oracle(rng, name, values, targets, mask):
    """Returns what the loss gave: ((loss, stats), gradient)."""
    results, gradient = jax.device_get(differentiated(name)(values, targets, mask, None))
    loss, stats = results
    np.testing.assert_allclose(loss, oracle(name, values, targets, mask), rtol=1e-5)
    assert stats.num_valid == mask.sum()
    plain = oracle(name if name in BOX_LOSSES else "cross_entropy", values, targets, mask)
    np.testing.assert_allclose(stats.plain_loss, plain, rtol=1e-5)
    direction, step = rng.normal(size=SHAPE), 1e-6
    up, down = (oracle(name, values + s * direction, targets, mask) for s in (step, -step))
    np.testing.assert_allclose(
        np.sum(gradient * direction), (up - down) / (2 * step), rtol=1e-3, atol=1e-5
    )
    return results, gradient


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_oracle(rng, name):
    assert_equals_the_oracle(rng, name, *draw(rng, name))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_the_slope_of_focal_loss_is_exact_for_any_gamma_target_and_logit(rng, gamma):
    logits = np.float32(np.append(rng.normal(0, 6, 200), [0, 30, -30, 90, -90, 200, -200, 1e5]))
    targets = np.float32(rng.choice([0, 1, 0.25, 0.9], logits.size))
    slope = jax.jit(jax.grad(lambda x: focal_loss(x, targets, alpha=None, gamma=gamma)[0]))(logits)
    x, t = np.float64(logits), np.float64(targets)
    log_p, log_q = -np.logaddexp(0, -x), -np.logaddexp(0, x)
    p, q = np.exp(log_p), np.exp(log_q)
    missed, plain = p * (1 - t) + q * t, -t * log_p - (1 - t) * log_q
    # The product rule, with gamma m^(gamma - 1) p q as logarithms where m underflows.
    log_missed = np.select([t == 0, t == 1], [log_p, log_q], np.log(missed + 1e-300))
    inner = gamma * np.exp((gamma - 1) * log_missed + log_p + log_q) * (1 - 2 * t) * plain
    outer = np.exp(gamma * log_missed) * (p * (1 - t) - q * t)
    error = np.abs(slope * max(targets.sum(), 1) - (outer + inner))
    assert (error <= 2e-5 * (np.abs(outer) + np.abs(inner)) + 1e-30).all()  # the two may cancel


def test_focal_loss_has_a_gradient_for_soft_targets(rng):
    values, _, _ = draw(rng, "focal")
    targets = np.float32(rng.uniform(0.1, 0.9, SHAPE))

    def formula(targets):
        p = jax.nn.sigmoid(values)
        terms = (p * (1 - targets) + (1 - p) * targets) ** 1.5
        terms *= -targets * jax.nn.log_sigmoid(values) - (1 - targets) * jax.nn.log_sigmoid(-values)
        return terms.sum() / targets.sum()

    def ours(targets):
        return focal_loss(values, targets, alpha=None, gamma=1.5)[0]

    np.testing.assert_allclose(
        *(jax.grad(f)(targets) for f in (ours, formula)), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_options_on_number_types_change_nothing(rng, name, dtype, number_types):
    values, targets, mask = draw(rng, name)
    results, gradient = assert_equals_the_oracle(
        rng, name, values.astype(dtype), targets.astype(dtype), mask
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(np.float32)}
    assert gradient.dtype == (dtype if number_types == "64-bit" else np.float32)


@pytest.mark.parametrize("name", LOSSES)
def test_replicas_equal_one_device(rng, name):
    values, targets, mask = draw(rng, name)
    mask[:12] = False
    targets[12:32] = 0  # replicas without positives
    want, slope = differentiated(name)(values, targets, mask, None)

    @functools.partial(jax.pmap, axis_name="replica")
    def run(*args):
        (loss, stats), gradient = differentiated(name, "replica")(*args, None)
        return (jax.lax.psum(loss, "replica"), stats), gradient

    got, gradient = run(*(array.reshape(8, 8, 20) for array in (values, targets, mask)))
    np.testing.assert_allclose(gradient.reshape(SHAPE), slope, rtol=1e-5, atol=1e-9)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, np.full(8, b), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_values_do_not_matter_and_unmasked_nan_shows(rng, name):
    values, targets, mask = draw(rng, name)
    want, slope = differentiated(name)(values, targets, mask, None)
    junk = np.float32(rng.choice([np.nan, np.inf, 3.0], SHAPE))
    hidden = np.where(mask, values, junk), np.where(mask, targets, junk)
    (loss, stats), gradient = differentiated(name)(*hidden, mask, None)
    assert loss == want[0]
    assert stats.num_nonfinite == 0
    np.testing.assert_array_equal(gradient, slope)
    mask[0, 0], values[0, 0] = True, np.nan
    (loss, stats), _ = differentiated(name)(values, targets, mask, None)
    assert np.isnan(loss)
    assert stats.num_nonfinite == 1


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_valid_gives_zero(rng, name):
    values, targets, mask = draw(rng, name)
    (loss, stats), gradient = differentiated(name)(values, targets, np.zeros_like(mask), None)
    assert loss == 0
    assert stats.plain_loss == 0
    assert not np.any(gradient)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "ohem"])
def test_class_indices_are_dense_targets_with_a_mask(rng, name):
    values, _, _ = draw(rng, name)
    classes = rng.integers(-2, 20, 64)
    dense = np.float32(classes[:, None] == np.arange(20))
    kept = np.repeat(classes[:, None] != -2, 20, axis=1)
    got, gradient = differentiated(name)(values, classes, None, None)
    want, slope = differentiated(name)(values, dense, kept, None)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_are_never_broadcast(name):
    zeros = jnp.zeros((6, 4))
    with pytest.raises(ValueError, match="must have"):
        LOSSES[name](zeros, jnp.zeros((6, 1)))
    with pytest.raises(ValueError, match="must have"):
        LOSSES[name](zeros, zeros, jnp.ones(6))


def test_the_state_is_returned_unchanged():
    def check(zeros, state):
        for loss in LOSSES.values():
            assert loss(zeros, zeros, None, state)[1] is state

    jax.eval_shape(check, jnp.zeros((6, 4)), init_ghm_state(10))


def test_ohem_keeps_the_hardest_of_any_size(rng):
    # Cross-entropies from 1e-6 to 1e6, so that every bit of the threshold is needed.
    logits = np.float32(10 ** rng.uniform(0, 6, (50, 1)))
    logits[20:35] = -np.log(10) * rng.uniform(0, 6, (15, 1))
    targets = np.zeros((50, 1), np.float32)
    for positives in (1, 5, 12):
        targets[:positives] = 1
        loss, *_ = ohem_loss(jnp.asarray(logits), jnp.asarray(targets))
        np.testing.assert_allclose(
            loss, oracle("ohem", logits, targets, np.ones((50, 1), bool)), rtol=1e-5
        )

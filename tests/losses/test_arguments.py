"""What people pass to the losses: it means what they expect, or a ValueError says what to give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from ghm_jax.losses import (
    GHMState,
    cross_entropy_loss,
    focal_loss,
    ghm_c_loss,
    ghm_r_loss,
    init_ghm_state,
    ohem_loss,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASS_LOSSES = [ghm_c_loss, cross_entropy_loss, focal_loss, ohem_loss]
SHAPE = (12, 3)


def draw(rng):
    """Logits without any near a bin's edge, and targets of 0 and 1, both f32[SHAPE]."""
    targets = np.float32(rng.uniform(size=SHAPE) < 0.3)
    logits = oracles.draw_off_edges(
        lambda: rng.normal(0, 2, SHAPE), lambda x: norm_of(x, targets), bins=30
    )
    return logits, targets


def norm_of(logits, targets):
    return np.abs(oracles.sigmoid(logits) - targets)


def ghm_c_of(logits, targets, mask=None, weights=None, **settings):
    """Loss and gradient of GHM-C in float64, of a batch alone unless its weights are given."""
    mask = np.ones(logits.shape, bool) if mask is None else mask
    if weights is None:
        norm = norm_of(logits, targets)
        settings = {"bins": 30, "momentum": 0.0} | settings
        weights = oracles.weights_after([norm], [mask], **settings)
    terms = oracles.binary_cross_entropy(logits, targets)
    slope = weights * (oracles.sigmoid(logits) - targets)
    return (weights * terms).sum() / mask.sum(), slope / mask.sum()


def assert_ghm_c(wanted, logits, *rest, **settings):
    def call(logits):
        return ghm_c_loss(logits, *rest, **settings)[0]

    loss, gradient = jax.value_and_grad(call)(jnp.asarray(logits))
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted[1], rtol=2e-5, atol=1e-9)


@functools.cache
def slope_of(loss):
    return jax.jit(jax.grad(lambda logits, targets: loss(logits, targets)[0]))


@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int64, np.uint8, np.uint16, np.uint64])
def test_class_indices_of_every_type_reach_every_class(loss, kind):
    """300 classes: 254 and 255 are -2 and -1 in 8 bits."""
    kind, num_classes = np.dtype(kind), 300
    classes = [
        c for c in (-1, -2, 0, 127, 254, 255, 299) if np.can_cast(np.min_scalar_type(c), kind)
    ]
    logits = np.zeros((len(classes), num_classes), np.float32)
    libraries = [np, jnp] if kind.itemsize < 8 else [np]  # JAX has 64 bits on request only
    for targets in (library.array(classes, kind) for library in libraries):
        slope = np.asarray(slope_of(loss)(logits, targets))
        # A positive example is pushed up, a negative one down, an ignored one stays.
        up = {(i, c) for i, c in enumerate(classes) if c >= 0}
        assert set(zip(*map(np.ndarray.tolist, np.nonzero(slope < 0)), strict=True)) == up
        ignored = [c == -2 for c in classes]
        assert not slope[ignored].any()
        if loss is not ohem_loss:  # which leaves out easy negatives, but none is easier here
            assert (np.count_nonzero(slope, axis=1) == np.where(ignored, 0, num_classes)).all()


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_the_loss_of_narrow_class_indices_is_that_of_the_formula(rng, kind):
    classes = np.array([0, 126, 127, 100, 5], kind)
    targets = np.float32(classes[:, None] == np.arange(300))
    logits = oracles.draw_off_edges(
        lambda: rng.normal(0, 2, (5, 300)), lambda x: norm_of(x, targets), bins=30
    )
    assert_ghm_c(ghm_c_of(logits, targets), logits, classes)


@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize(
    ("classes", "refused"),
    [([0, 3], "3"), ([0, -3], "-3"), ([255, 1], "255"), ([2**31, 0], "2147483648")],
)
def test_a_class_without_a_meaning_is_refused_where_it_is_known(loss, classes, refused):
    with pytest.raises(ValueError, match=rf"below 3, -1 .* or -2 .*, got {refused}$"):
        loss(jnp.zeros((2, 3)), np.array(classes))


COUNTS = np.arange(30, dtype=np.float32)


@pytest.mark.parametrize(
    "state",
    [
        {"counts": COUNTS, "step": np.int32(1)},
        {"step": 1, "counts": COUNTS.tolist()},  # as JSON gives it back
        [COUNTS, np.int64(1)],
        (COUNTS.astype(np.float64), jnp.array(1)),
        [COUNTS.tolist(), 1],
        GHMState(COUNTS, 1),  # pyright: ignore[reportArgumentType]
    ],
    ids=["mapping", "JSON object", "list", "tuple", "JSON list", "Python number"],
)
def test_a_state_in_the_form_of_a_checkpoint_or_json_is_the_state(rng, state):
    logits, targets = draw(rng)
    seen = oracles.histogram(norm_of(logits, targets), np.ones(SHAPE, bool), 30)
    moving = 0.75 * np.float64(COUNTS) + 0.25 * seen
    average = moving / (1 - 0.75**2)
    inverse = 1 / np.maximum(average, 10)
    table = inverse * average.sum() / (inverse * average).sum()
    weights = table[oracles.bin_of(norm_of(logits, targets), 30)]
    assert_ghm_c(ghm_c_of(logits, targets, weights=weights), logits, targets, None, state)
    _, new, _ = ghm_c_loss(logits, targets, None, state)
    assert isinstance(new, GHMState)
    assert int(new.step) == 2
    np.testing.assert_allclose(new.counts, moving, rtol=1e-5)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"counts": COUNTS}, "must be a GHMState, a mapping of its `counts` and `step`.*init_ghm"),
        ({"counts": COUNTS, "step": 1, "more": 2}, "got a dict"),
        (COUNTS, "got a ndarray"),
        ("state", "got a str"),
        ([COUNTS], "got a list"),
        ((1, COUNTS), "state.counts must be f32"),
        ({"counts": COUNTS, "step": 1.5}, "state.step must be one integer"),
        ({"counts": -COUNTS, "step": 1}, "state.counts must be finite and not negative, got -1"),
        ({"counts": COUNTS * np.nan, "step": 1}, "state.counts must be finite"),
        ({"counts": COUNTS, "step": -1}, "state.step must be finite and not negative, got -1"),
        ({"counts": ["a"], "step": 1}, "state.counts must"),
    ],
)
def test_what_is_no_state_is_refused_with_what_to_give(state, words):
    with pytest.raises(ValueError, match=words):
        ghm_c_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), None, state)


def test_a_state_in_the_place_of_the_mask_is_refused_with_its_keyword():
    with pytest.raises(ValueError, match=r"mask must be an array, got a GHMState.*state="):
        ghm_c_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), init_ghm_state(30))


def test_lists_and_integers_in_the_place_of_arrays_are_those_arrays(rng):
    logits, targets = draw(rng)
    mask = rng.uniform(size=SHAPE) < 0.7
    wanted = ghm_c_of(logits, targets, mask)
    for same in (targets.tolist(), targets.astype(bool), targets.astype(np.int8)):
        assert_ghm_c(wanted, logits, same, mask)
    assert_ghm_c(wanted, logits, targets, mask.tolist())
    assert_ghm_c(wanted, logits, targets.astype(int).tolist(), mask.astype(int).tolist())
    loss, *_ = ghm_c_loss(logits.tolist(), targets.tolist(), mask.tolist())
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    classes = rng.integers(0, 3, 12)
    logits, targets = logits * 0 + 2, np.float32(classes[:, None] == np.arange(3))
    assert_ghm_c(ghm_c_of(logits, targets), logits, classes.tolist())


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([[0.0, 1.0], [0.0]], "targets must be an array, or lists of one length"),
        ([["a", "b"], ["c", "d"]], "targets must hold numbers"),
        (np.ones((2, 2), complex), "targets must hold numbers, got complex"),
        ({"a": 1}, "targets must be an array, got a dict"),
    ],
)
@pytest.mark.parametrize("loss", [ghm_c_loss, ghm_r_loss, cross_entropy_loss])
def test_what_is_no_array_of_numbers_is_refused_by_name(loss, targets, words):
    with pytest.raises(ValueError, match=words):
        loss(jnp.zeros((2, 2)), targets)


@pytest.mark.parametrize("left_out", [-1.0, 0.0, np.nan])
@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_label_weights_that_are_not_above_zero_leave_out(rng, left_out, wrap):
    logits, targets = draw(rng)
    used = rng.uniform(size=SHAPE) < 0.7
    label_weights = np.where(used, np.float32(0.5), np.float32(left_out))
    loss, _, stats = wrap(ghm_c_loss)(logits, targets, label_weights)
    np.testing.assert_allclose(loss, ghm_c_of(logits, targets, used)[0], rtol=1e-5)
    assert stats.num_valid == used.sum()
    _, _, stats = wrap(cross_entropy_loss)(logits, targets, label_weights)
    terms = oracles.binary_cross_entropy(logits, targets)
    np.testing.assert_allclose(stats.plain_loss, terms[used].mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_dense_target_of_minus_one_is_refused_unless_masked(rng, loss, kind):
    logits, targets = draw(rng)
    marked, used = targets.astype(kind), np.ones(SHAPE, bool)
    marked[3, 1], used[3, 1] = -1, False
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\], got -1.*`mask`"):
        loss(logits, marked)
    found, wanted = loss(logits, marked, used)[0], loss(logits, targets, used)[0]
    np.testing.assert_array_equal(found, wanted)
    if loss is ghm_c_loss:
        np.testing.assert_allclose(found, ghm_c_of(logits, targets, used)[0], rtol=1e-5)


@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_labels_of_one_logit_have_its_shape_or_are_refused(rng, loss):
    logits, labels = np.float32(rng.normal(size=(8, 1))), np.arange(8) % 2
    with pytest.raises(ValueError, match="got 1; give 0/1 labels of one logit in the shape of the"):
        loss(logits, labels)
    gradient = slope_of(loss)(logits, labels[:, None])
    assert (np.sign(gradient)[:, 0] == np.where(labels, -1, 1)).all()


@pytest.mark.parametrize(
    "numbers",
    [
        {"momentum": 0.9},
        {"min_count": 3.0},
        {"momentum": 0.5, "min_count": 1.0, "strength": 0.5},
        {"min_count": 0},
    ],
)
def test_settings_may_follow_a_schedule(rng, numbers):
    settings = {"bins": 30, "momentum": 0.75, "min_count": 10.0} | numbers

    @jax.jit
    def call(logits, targets, state, numbers):
        loss, new, _ = ghm_c_loss(logits, targets, None, state, **numbers)
        return loss, new

    history, state = [], init_ghm_state(30)
    for _ in range(2):
        logits, targets = draw(rng)
        history.append(norm_of(logits, targets))
        (loss, state), gradient = jax.value_and_grad(call, has_aux=True)(
            logits, targets, state, numbers
        )
        weights = oracles.weights_after(history, [np.ones(SHAPE, bool)] * len(history), **settings)
        wanted = ghm_c_of(logits, targets, weights=weights)
        np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, wanted[1], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("bins", 30, "bins: must be a Python int, got a traced value"),
        ("bias_correction", True, "bias_correction: must be a Python bool, got a traced value"),
        ("momentum", np.zeros(2), "momentum: must be one number"),
    ],
)
def test_a_traced_setting_that_decides_the_program_is_refused(setting, value, words):
    with pytest.raises(ValueError, match=words):
        jax.jit(lambda value: ghm_c_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), **{setting: value}))(
            value
        )

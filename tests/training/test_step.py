"""The step of one replica: right numbers, and the same ones on any number of replicas."""

import dataclasses
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import (
    binary_cross_entropy,
    exact_density,
    published_weights,
    sigmoid,
    weights_after,
)
from tiny import GHM_C, GHM_R, SIDE, tiny_batch, tiny_config

from ghm_jax import losses
from ghm_jax.batch import NO_CLASS
from ghm_jax.config import REFERENCE, Anchors, Loss, Optimizer
from ghm_jax.detection.anchors import make_anchors
from ghm_jax.detection.levels import split_levels
from ghm_jax.detection.loss import GHMStates
from ghm_jax.detection.outputs import make_targets, normalize
from ghm_jax.distributed.devices import REPLICA, parallelize, split_batch
from ghm_jax.training.build import make_model
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.state import Skipped, TrainState, init_state
from ghm_jax.training.step import train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = tiny_config(
    optimizer=Optimizer(name="sgd", batch_size=8, learning_rate=0.003, warmup_steps=0)
)
PUBLISHED = {"ghm_c": replace(GHM_C, **REFERENCE), "ghm_r": replace(GHM_R, **REFERENCE)}
LEVEL_SIZES = (8 * 8, 4 * 4, 2 * 2, 1, 1)
NUM_ANCHORS, NUM_CLASSES = sum(LEVEL_SIZES), 2
SCALARS = {
    *("loss", "loss_class", "loss_box", "cross_entropy", "box_error"),
    *("num_positive", "num_nonfinite", "grad_norm", "skipped", "skipped_in_a_row"),
}


class Table:
    """Replaces the network: its parameters are its outputs, the same for all images except for a
    shift by the brightness of the image."""

    anchors_per_cell = 1

    @staticmethod
    def apply(variables, images, *, train, mutable):
        del train, mutable
        shift = 0.1 * images.mean(axis=(1, 2, 3))[:, None, None]
        params = variables["params"]
        outputs = params["logits"][None] + shift, params["deltas"][None] + shift
        return tuple(split_levels(x, LEVEL_SIZES) for x in outputs), {}


def table_outputs(params, batch):
    """The outputs of `Table`, in NumPy."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    images = (batch.images.astype(np.float64) - mean) / std
    shift = 0.1 * images.mean(axis=(1, 2, 3))[:, None, None]
    return np.asarray(params["logits"]) + shift, np.asarray(params["deltas"]) + shift


def table_state(seed=0, optimizer=None):
    rng = np.random.default_rng(seed)
    params = {
        "logits": rng.normal(0, 2, (NUM_ANCHORS, NUM_CLASSES)).astype(np.float32),
        "deltas": rng.normal(0, 0.5, (NUM_ANCHORS, 4)).astype(np.float32),
    }
    ghm = GHMStates(losses.init_ghm_state(10), losses.init_ghm_state(5))
    optimizer = optimizer or optax.sgd(0.0)
    step, skipped = jnp.zeros((), jnp.int32), Skipped(*jnp.zeros((2,), jnp.int32))
    return TrainState(step, params, {}, optimizer.init(params), ghm, None, skipped)


def table_step(config, optimizer=None):
    settings = {"config": config, "model": Table(), "optimizer": optimizer or optax.sgd(0.0)}
    return jax.jit(functools.partial(train_step, **settings))


def batches(count, size=8):
    return [tiny_batch(np.random.default_rng(seed), size) for seed in range(count)]


def mean_over(terms, used):
    return (terms * used).sum() / used.sum()


@pytest.mark.parametrize(
    "loss",
    [
        Loss(ghm_c=GHM_C, ghm_r=GHM_R, weight=2.0, box_weight=5.0),
        Loss(**PUBLISHED, weight=1.0, box_weight=10.0),
        Loss(classification="focal", box="smooth_l1", weight=0.5, box_weight=3.0),
        Loss(
            classification="cross_entropy",
            ghm_r=replace(GHM_R, min_count=1.0),
            weight=20.0,
            box_weight=10.0,
        ),
        Loss(classification="ohem", box="asl1", mu=0.05, weight=1.0, box_weight=4.0),
        Loss(
            ghm_c=replace(GHM_C, strength=0.5, normalizer="bins"),
            ghm_r=replace(GHM_R, strength=0.75, normalizer="bins"),
            weight=1.5,
            box_weight=0.0,
        ),
    ],
    ids=["ghm", "reference", "focal", "cross_entropy", "ohem", "strength"],
)
def test_losses_are_those_of_the_formulas(loss):
    config = dataclasses.replace(CONFIG, loss=loss)
    state, step = table_state(), table_step(config)
    seen = [batches(2)[i] for i in range(2)]
    for batch in seen:
        state, metrics = step(state, batch)

    # Every (anchor, class) pair that is not ignored, and the coordinates of positive anchors.
    norms, masks, box_norms, box_masks = [], [], [], []
    for batch in seen:
        logits, deltas = table_outputs(state.params, batch)  # the learning rate is 0
        classes, box_targets = (np.asarray(x) for x in make_targets(batch, config))
        targets = (classes[..., None] == np.arange(NUM_CLASSES)).astype(float)
        norms.append(np.abs(sigmoid(logits) - targets))
        masks.append(np.broadcast_to(classes[..., None] > -2, targets.shape))
        error = deltas - box_targets
        box_norms.append(np.abs(error) / np.sqrt(error**2 + loss.mu**2))
        box_masks.append(np.broadcast_to(classes[..., None] >= 0, error.shape))
    terms = binary_cross_entropy(logits, targets)
    box_terms = np.sqrt(error**2 + loss.mu**2) - loss.mu

    if loss.classification == "focal":
        alpha = np.where(targets == 1, 0.25, 0.75)
        value = (alpha * norms[-1] ** 2 * terms * masks[-1]).sum() / targets.sum()
    elif loss.classification == "ohem":
        positive, negative = (terms[masks[-1] & (targets == t)] for t in (1, 0))
        value = np.append(positive, np.sort(negative)[-3 * positive.size :]).mean()
    elif loss.classification == "cross_entropy":
        value = mean_over(terms, masks[-1])
    elif loss.ghm_c == PUBLISHED["ghm_c"]:
        weights, moving = published_weights(norms, masks, bins=10, momentum=0.75)
        np.testing.assert_allclose(state.ghm.classification.counts, moving, rtol=1e-5)
        value = mean_over(weights * terms, masks[-1])
    else:
        how = {"strength": loss.ghm_c.strength, "normalizer": loss.ghm_c.normalizer}
        weights = weights_after(norms, masks, bins=10, momentum=0.75, **how)
        value = mean_over(weights * terms, masks[-1])
    if loss.box == "smooth_l1":
        size = np.abs(error)
        box_terms = np.where(size < 1 / 9, 4.5 * size**2, size - 1 / 18)
        box_value = mean_over(box_terms, box_masks[-1])
    elif loss.box == "asl1":
        box_value = mean_over(box_terms, box_masks[-1])
    elif loss.ghm_r == PUBLISHED["ghm_r"]:
        weights, _ = published_weights(box_norms, box_masks, bins=5, momentum=0.7)
        box_value = mean_over(weights * box_terms, box_masks[-1])
    else:
        how = {"strength": loss.ghm_r.strength, "normalizer": loss.ghm_r.normalizer}
        weights = weights_after(
            box_norms, box_masks, bins=5, momentum=0.7, min_count=loss.ghm_r.min_count, **how
        )
        box_value = mean_over(weights * box_terms, box_masks[-1])

    expected = {
        "loss_class": value,
        "loss_box": box_value,
        "loss": loss.weight * value + loss.box_weight * box_value,
        "cross_entropy": mean_over(terms, masks[-1]),
        "box_error": mean_over(box_terms, box_masks[-1]),
        "num_positive": (classes >= 0).sum() / 8,
        "num_nonfinite": 0,
    }
    assert (classes >= 0).any()
    assert (classes == -2).any()
    np.testing.assert_allclose(
        [metrics[key] for key in expected], list(expected.values()), rtol=2e-5
    )
    with_histogram = {"ghm_c": loss.classification == "ghm_c", "ghm_r": loss.box == "ghm_r"}
    histograms = {name for name, has in with_histogram.items() if has}
    assert metrics.keys() == SCALARS | {"nonfinite_images"} | histograms
    assert all(metrics[key].shape == () for key in SCALARS)
    if with_histogram["ghm_c"]:
        assert metrics["ghm_c"]["counts"].sum() == masks[-1].sum()
        assert metrics["ghm_c"]["weights"].shape == (10,)
    if with_histogram["ghm_r"]:
        assert metrics["ghm_r"]["counts"].sum() == box_masks[-1].sum()
        assert metrics["ghm_r"]["weights"].shape == (5,)
    assert int(state.step) == 2


def each_step(state, step, steps=3):
    for batch in batches(steps):
        state, metrics = step(state, batch)
        yield state, metrics


def run(state, step, steps=3):
    *_, last = each_step(state, step, steps)
    return last


def network(norm, axis_name):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, norm=norm))
    optimizer = make_optimizer(config)
    model = make_model(config, NUM_CLASSES, axis_name)
    settings = {"config": config, "model": model, "optimizer": optimizer, "axis_name": axis_name}
    state = jax.jit(functools.partial(init_state, config, model, optimizer))()
    return state, functools.partial(train_step, **settings)


def test_the_published_scope_is_one_call_per_level():
    loss = Loss(**PUBLISHED, ghm_scope="level")
    config = dataclasses.replace(CONFIG, loss=loss)
    state, step = table_state(), table_step(config)
    edges = np.cumsum([8 * 8, 4 * 4, 2 * 2, 1])
    norms, masks, box_norms, box_masks = [], [], [], []  # one of each call, over all steps
    for batch in batches(2):
        state, metrics = step(state, batch)
        logits, deltas = table_outputs(state.params, batch)  # the learning rate is 0
        classes, box_targets = (np.asarray(x) for x in make_targets(batch, config))
        targets = (classes[..., None] == np.arange(NUM_CLASSES)).astype(float)
        error = deltas - box_targets
        used = np.broadcast_to(classes[..., None] > -2, targets.shape)
        positive = np.broadcast_to(classes[..., None] >= 0, error.shape)
        value = box_value = 0.0
        for of_level in np.split(np.arange(NUM_ANCHORS), edges):
            norms.append(np.abs(sigmoid(logits) - targets)[:, of_level])
            masks.append(used[:, of_level])
            weights, moving = published_weights(norms, masks, bins=10, momentum=0.75)
            terms = binary_cross_entropy(logits, targets)[:, of_level]
            value += mean_over(weights * terms, masks[-1])
            box_norms.append((np.abs(error) / np.hypot(error, loss.mu))[:, of_level])
            box_masks.append(positive[:, of_level])
            weights, box_moving = published_weights(box_norms, box_masks, bins=5, momentum=0.7)
            terms = (np.hypot(error, loss.mu) - loss.mu)[:, of_level]
            box_value += (weights * terms * box_masks[-1]).sum() / max(box_masks[-1].sum(), 1)
    got = [metrics["loss_class"], metrics["loss_box"]]
    np.testing.assert_allclose(got, [value, box_value], rtol=2e-5)
    np.testing.assert_allclose(state.ghm.classification.counts, moving, rtol=1e-5)
    np.testing.assert_allclose(state.ghm.box.counts, box_moving, rtol=1e-5)
    assert metrics["ghm_c"]["counts"].sum() == used.sum()
    plain = mean_over(binary_cross_entropy(logits, targets), used)
    np.testing.assert_allclose(metrics["cross_entropy"], plain, rtol=1e-5)


def test_a_loss_of_the_users_own_is_trained_with(tmp_path, monkeypatch):
    (tmp_path / "losses_of_mine.py").write_text(
        "import functools\n"
        "from ghm_jax.losses import focal_loss, smooth_l1_loss\n"
        "sharper = functools.partial(focal_loss, gamma=3.0)\n"
        "def half(*levels, **axis):\n"
        "    loss, state, stats = smooth_l1_loss(*levels, **axis)\n"
        "    return 0.5 * loss, state, stats\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (batch,) = batches(1)
    found = []
    for names in (
        {"classification": "losses_of_mine:sharper", "box": "losses_of_mine:half"},
        {"classification": "focal", "box": "smooth_l1"},
    ):
        config = replace(CONFIG, loss=Loss(**names, weight=1.0, box_weight=4.0))
        found.append(table_step(config)(table_state(), batch)[1])
    logits, _ = table_outputs(table_state().params, batch)
    classes, _ = (np.asarray(x) for x in make_targets(batch, config))
    targets = (classes[..., None] == np.arange(NUM_CLASSES)).astype(float)
    factor = np.where(targets == 1, 0.25, 0.75) * np.abs(sigmoid(logits) - targets) ** 3
    used = classes[..., None] > -2
    value = (factor * binary_cross_entropy(logits, targets) * used).sum() / targets.sum()
    np.testing.assert_allclose(found[0]["loss_class"], value, rtol=2e-5)
    np.testing.assert_allclose(found[0]["loss_box"], found[1]["loss_box"] / 2, rtol=1e-6)


def test_losses_without_a_histogram_have_one_mean_over_all_levels_in_the_published_scope():
    values = []
    for scope in ("batch", "level"):
        loss = Loss(classification="focal", box="smooth_l1", ghm_scope=scope)
        _, metrics = table_step(dataclasses.replace(CONFIG, loss=loss))(
            table_state(), next(iter(batches(1)))
        )
        values.append([metrics["loss_class"], metrics["loss_box"]])
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.mark.parametrize("how", [REFERENCE, {"min_count": 3.0, "strength": 0.5}])
def test_exact_density_uses_the_batch_alone(how):
    loss = Loss(ghm_c=replace(GHM_C, density="exact", **how), ghm_r=GHM_R)
    config = dataclasses.replace(CONFIG, loss=loss)
    state, step = table_state(), table_step(config)
    for batch in batches(2):
        state, metrics = step(state, batch)
    logits, _ = table_outputs(state.params, batch)
    classes = np.asarray(make_targets(batch, config).classes)
    targets = (classes[..., None] == np.arange(NUM_CLASSES)).astype(float)
    used = np.broadcast_to(classes[..., None] > -2, targets.shape)
    nearby = exact_density(np.abs(sigmoid(logits) - targets), used, 0.1) / 10
    inverse = np.maximum(nearby, how["min_count"] or 1e-9) ** -how["strength"]
    weights = inverse / mean_over(inverse, used)
    value = mean_over(weights * binary_cross_entropy(logits, targets), used)
    np.testing.assert_allclose(metrics["loss_class"], value, rtol=1e-4)
    assert not state.ghm.classification.counts.any()


@pytest.fixture(scope="module")
def one_device():
    """The step of the network on one device, without any collective; the state that it starts from,
    and what each of three steps returns."""

    @functools.cache
    def result(norm):
        start, step = network(norm, None)
        step = jax.jit(step)
        return step, start, list(each_step(start, step))

    return result


def assert_close(found, expected):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        # Where gradients cancel, rounding is relative to what cancelled: hence the largest value.
        atol = 5e-4 * np.abs(y).max() + 1e-6
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_same_steps(step, start, expected):
    """The last state. Each step is from the expected state: rounding that adds up over steps moves
    an activation over the kink of a ReLU sooner or later, and its gradient is then another one."""
    before = start
    for batch, after in zip(batches(len(expected)), expected, strict=True):
        found = step(before, batch)
        assert_close(found, after)
        before, _ = after
    return found[0]


def on_replicas(step, replicas, wrapper="pmap"):
    """A step that takes whole batches, like that of one device."""
    step = parallelize(step, jax.devices()[:replicas], wrapper)
    return lambda state, batch: step(state, split_batch(batch, replicas))


@pytest.mark.parametrize(
    ("replicas", "wrapper", "classification"),
    [
        (1, "pmap", "ghm_c"),
        (2, "shard_map", "ghm_c"),
        (4, "pmap", "ghm_c"),
        (8, "pmap", "ghm_c"),
        (8, "shard_map", "focal"),
    ],
)
def test_any_number_of_replicas_makes_the_same_step(replicas, wrapper, classification):
    config = dataclasses.replace(
        CONFIG, loss=dataclasses.replace(CONFIG.loss, classification=classification)
    )
    optimizer = optax.sgd(10.0, momentum=0.9)
    expected = run(table_state(0, optimizer), table_step(config, optimizer))
    step = functools.partial(
        train_step, config=config, model=Table(), optimizer=optimizer, axis_name=REPLICA
    )
    found = run(table_state(0, optimizer), on_replicas(step, replicas, wrapper))
    assert_close(found, expected)
    assert np.abs(found[0].params["logits"] - table_state().params["logits"]).max() > 0.1


@pytest.mark.parametrize(
    ("norm", "replicas"), [("batch", 2), pytest.param("group", 4, marks=pytest.mark.slow)]
)
def test_replicas_of_a_network_make_the_same_step(one_device, norm, replicas):
    _, start, expected = one_device(norm)
    _, step = network(norm, REPLICA)
    state = assert_same_steps(on_replicas(step, replicas), start, expected)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start.params, state.params)
    assert all(jax.tree.leaves(moved))  # every parameter changed, so all were compared
    assert bool(jax.tree.leaves(state.batch_stats)) == (norm == "batch")


def test_a_few_images_are_overfitted(one_device):
    step, state, _ = one_device("batch")
    batch = batches(1)[0]
    values = []
    for _ in range(100):
        state, metrics = step(state, batch)
        values.append((float(metrics["cross_entropy"]), float(metrics["box_error"])))
    first, last = np.array(values[0]), np.array(values[-1])
    assert (last < 0.6 * first).all(), (first, last)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_stages_are_the_same_bits_after_two_steps(optimizer):
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, norm="batch", frozen_stages=2),
        optimizer=Optimizer(
            name=optimizer, batch_size=8, learning_rate=0.01, weight_decay=0.1, warmup_steps=0
        ),
    )
    model, optimizer = make_model(config, NUM_CLASSES), make_optimizer(config)
    start = jax.jit(functools.partial(init_state, config, model, optimizer))()
    step = functools.partial(train_step, config=config, model=model, optimizer=optimizer)
    state, _ = run(start, jax.jit(step), steps=2)
    for before, after in ((start.params, state.params), (start.batch_stats, state.batch_stats)):
        for path, leaf in jax.tree.leaves_with_path(before):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            still = name.startswith(tuple(f"backbone/{s}" for s in ("stem", "stage1", "stage2")))
            now = functools.reduce(lambda tree, key: tree[key.key], path, after)
            assert bool((leaf == now).all()) == still, name


def test_images_become_standard_deviations_from_the_mean_and_padding_becomes_zero(rng):
    images = rng.integers(0, 256, (2, 8, 12, 3), np.uint8)
    size = np.array([[5, 12], [8, 7]], np.int32)
    found = normalize(images, size)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # torchvision's way
    expected[0, 5:], expected[1, :, 7:] = 0, 0
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("crowd", ["drop", "ignore"])
def test_a_crowd_region_is_background_or_ignored(crowd):
    config = dataclasses.replace(CONFIG, anchors=dataclasses.replace(CONFIG.anchors, crowd=crowd))
    batch = batches(1, size=2)[0]
    batch.truth.boxes[:], batch.truth.labels[:] = 0, NO_CLASS
    batch.truth.boxes[0, 0], batch.truth.is_crowd[0, 0] = (0, 0, 32, 64), True
    classes = np.asarray(make_targets(batch, config).classes)
    assert (classes[1] == -1).all()
    assert set(classes[0]) == ({-1} if crowd == "drop" else {-1, -2})


def test_anchors_of_a_step_follow_the_chosen_convention():
    config = dataclasses.replace(
        CONFIG, anchors=Anchors(scale=4.1, octaves=1, ratios=(1.0,), convention="torchvision")
    )
    batch = batches(1, size=1)[0]
    batch.truth.boxes[:], batch.truth.labels[:] = 0, NO_CLASS
    batch.truth.boxes[0, 0], batch.truth.labels[0, 0] = (16, 16, 48, 48), 1  # int(4.1 * 8) = 32
    targets = make_targets(batch, config)
    positive = np.asarray(targets.classes[0]) == 1  # this one and its neighbours
    fits = (np.asarray(targets.deltas[0]) == 0).all(axis=1)
    assert (positive & fits).sum() == 1


def test_anchors_in_the_padding_are_ignored():
    config = CONFIG
    batch = batches(1, size=2)[0]
    sizes = np.array([[33, 64], [64, 20]], np.int32)  # which extend to 64 x 64 and 64 x 32
    batch = batch._replace(image_size=sizes)
    batch.truth.boxes[:], batch.truth.labels[:] = 0, NO_CLASS
    batch.truth.boxes[1, 0], batch.truth.labels[1, 0] = (2, 2, 18, 18), 1
    classes = np.asarray(make_targets(batch, config).classes)
    anchors = make_anchors((SIDE, SIDE), 2.0, 1, (1.0,))
    center = (anchors[:, 0] + anchors[:, 2]) / 2
    assert (classes[0] == -1).all()
    np.testing.assert_array_equal(classes[1] == -2, center >= 32)
    assert (classes[1] == 1).any()

    step = table_step(config)
    state = table_state()
    outside = (center >= 32)[:, None]
    only_second = jax.tree.map(lambda x: x[1:], batch)
    wild = jax.tree.map(lambda p: np.where(outside, 50, p).astype(np.float32), state.params)
    calm = jax.tree.map(lambda p: np.where(outside, -50, p).astype(np.float32), state.params)
    _, a = step(state._replace(params=wild), only_second)
    _, b = step(state._replace(params=calm), only_second)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("classification", ["ghm_c", "focal"])
def test_a_batch_without_any_box_is_learned_as_background(classification):
    config = dataclasses.replace(CONFIG, loss=Loss(classification=classification, ghm_c=GHM_C))
    batch = batches(1)[0]
    batch.truth.boxes[:], batch.truth.labels[:] = 0, NO_CLASS
    optimizer = optax.sgd(1.0)
    before = table_state(optimizer=optimizer)
    after, metrics = table_step(config, optimizer)(before, batch)
    assert metrics["num_positive"] == metrics["loss_box"] == metrics["num_nonfinite"] == 0
    assert np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(after.params["deltas"], before.params["deltas"])
    assert (after.params["logits"] < before.params["logits"]).all()


@pytest.mark.parametrize("classification", ["ghm_c", "focal"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(classification, value):
    config = dataclasses.replace(
        CONFIG,
        loss=Loss(classification=classification, ghm_c=GHM_C),
        optimizer=dataclasses.replace(CONFIG.optimizer, ema=0.9),
    )
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = table_step(config, optimizer)
    good, bad, last = batches(3)
    start = table_state(0, optimizer)
    start = start._replace(ema_params=jax.tree.map(jnp.asarray, start.params))
    before, metrics = step(start, good)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (0, 0)

    broken = before._replace(
        params={**before.params, "logits": before.params["logits"].at[3, 1].set(value)}
    )
    state = broken
    for count in (1, 2):
        state, metrics = step(state, bad)
        assert metrics["num_nonfinite"] == 8  # once in every image
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (count, count)
        assert sorted(metrics["nonfinite_images"].tolist()) == bad.image_id.tolist()
    assert int(state.step) == int(before.step) + 2
    without_counts = {"step": 0, "skipped": 0}
    for x, y in zip(
        jax.tree.leaves(state._replace(**without_counts)),
        jax.tree.leaves(broken._replace(**without_counts)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)

    state, metrics = step(state._replace(params=before.params), last)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    assert (metrics["nonfinite_images"] == -1).all()
    assert (state.params["logits"] != before.params["logits"]).any()


def test_an_image_with_nan_is_named_whatever_its_replica():
    batch = batches(1)[0]
    step = functools.partial(
        train_step, config=CONFIG, model=Fragile(), optimizer=optax.sgd(0.1), axis_name=REPLICA
    )
    batch.images[5] = 255
    before = table_state(0, optax.sgd(0.1))
    state, metrics = on_replicas(step, 4)(before, batch)
    assert metrics["nonfinite_images"].tolist() == [*[-1] * 5, batch.image_id[5], -1, -1]
    np.testing.assert_array_equal(state.params["logits"], before.params["logits"])


class Fragile(Table):
    """Its outputs for a white image are not finite."""

    @staticmethod
    def apply(variables, images, *, train, mutable):
        (logits, deltas), changed = Table.apply(variables, images, train=train, mutable=mutable)
        white = images.mean(axis=(1, 2, 3))[:, None, None] > 2
        return (logits, tuple(jnp.where(white, jnp.nan, level) for level in deltas)), changed


@pytest.mark.parametrize(
    "loss",
    [
        Loss(**PUBLISHED, ghm_scope="level"),
        Loss(ghm_c=replace(GHM_C, density="exact"), ghm_r=replace(GHM_R, density="exact")),
        Loss(classification="ohem", box="smooth_l1"),
    ],
    ids=["levels", "exact", "ohem"],
)
def test_microbatches_make_the_same_step_as_the_whole_batch(loss):
    """For losses that depend on the whole batch; microbatches differ in their numbers of boxes."""
    config, optimizer = dataclasses.replace(CONFIG, loss=loss), optax.sgd(10.0, momentum=0.9)
    expected = run(table_state(0, optimizer), table_step(config, optimizer))
    microbatched = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, accumulate=4)
    )
    found = run(table_state(0, optimizer), table_step(microbatched, optimizer))
    assert_close(found, expected)
    step = functools.partial(
        train_step,
        config=dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, accumulate=2)
        ),
        model=Table(),
        optimizer=optimizer,
        axis_name=REPLICA,
    )
    assert_close(run(table_state(0, optimizer), on_replicas(step, 2)), expected)


def test_microbatches_of_a_network_make_the_same_step_as_the_whole_batch(one_device):
    _, start, expected = one_device("group")
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, norm="group"),
        optimizer=dataclasses.replace(CONFIG.optimizer, accumulate=2),
    )
    step = functools.partial(
        train_step,
        config=config,
        model=make_model(config, NUM_CLASSES),
        optimizer=make_optimizer(config),
    )
    assert_same_steps(jax.jit(step), start, expected)


def test_the_moving_average_of_the_parameters_is_used_to_predict():
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, ema=0.4))
    optimizer = optax.sgd(10.0)
    state = table_state(0, optimizer)
    assert state.variables["params"] is state.params
    state = state._replace(ema_params=jax.tree.map(jnp.asarray, state.params))
    average = np.asarray(state.params["logits"], np.float64)
    step = table_step(config, optimizer)
    for i, batch in enumerate(batches(6)):
        state, _ = step(state, batch)
        decay = min(0.4, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * np.asarray(state.params["logits"], np.float64)
    np.testing.assert_allclose(state.variables["params"]["logits"], average, rtol=1e-5)
    assert np.abs(average - state.params["logits"]).max() > 0.01


def test_the_old_state_is_donated():
    state = jax.tree.map(jnp.asarray, table_state())
    step = functools.partial(
        train_step, config=CONFIG, model=Table(), optimizer=optax.sgd(0.0), axis_name=REPLICA
    )
    step = parallelize(step, jax.devices()[:2], donate=True)
    state, _ = step(state, split_batch(batches(1)[0], 2))
    after, _ = step(state, split_batch(batches(1)[0], 2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))

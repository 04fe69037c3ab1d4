"""The changes of GHM-C that the study tries, against their description in NumPy."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import binary_cross_entropy, sigmoid

from experiments.study import variants
from experiments.study.plan import QUESTIONS
from ghm_jax.losses import GHMState, init_ghm_state

CLASSES, BINS, MOMENTUM = 3, 30, 0.75
LEVELS = (400, 120)


@pytest.fixture
def batch(rng):
    """Logits and class indices of four images, by level, with background and ignored anchors."""
    logits = [rng.normal(-1, 2, (4, n, CLASSES)).astype(np.float32) for n in LEVELS]
    classes = [rng.choice([-2, -1, 0, 1, 2], (4, n), p=(0.1, 0.87, *[0.01] * 3)) for n in LEVELS]
    return logits, [x.astype(np.int32) for x in classes]


def examples(logits, classes):
    """Gradient norms, cross-entropies, targets and masks of all (anchor, class) pairs."""
    flat = np.concatenate([x.reshape(4, -1, CLASSES) for x in logits], 1).astype(float)
    index = np.concatenate(classes, 1)[..., None]
    targets = (index == np.arange(CLASSES)).astype(float)
    used = np.broadcast_to(index != -2, targets.shape)
    return np.abs(sigmoid(flat) - targets), binary_cross_entropy(flat, targets), targets, used


def harmonized_mean(norms, terms, used, floor, strength=1.0, counts=None):
    """The mean of the terms with weights from one histogram, of the first step."""
    bins = np.minimum((norms[used] * BINS).astype(int), BINS - 1)
    seen = np.bincount(bins, minlength=BINS).astype(float) if counts is None else counts(bins)
    filled = np.where(seen > 0, np.maximum(seen, floor), 1.0) ** -strength * (seen > 0)
    weights = filled * seen.sum() / (seen * filled).sum()
    return (weights[bins] * terms[used]).sum() / seen.sum()


def value_of(function, batch, bins=BINS, step=0):
    state = init_ghm_state(bins)._replace(step=jnp.asarray(step))
    call = jax.jit(lambda *levels: function(*levels, None, state))
    loss, following, stats = call(*batch)
    assert following.counts.shape == (bins,)
    assert following.step == step + 1
    assert stats.num_valid == pytest.approx(examples(*batch)[3].sum())
    plain = examples(*batch)[1][examples(*batch)[3]].mean()
    np.testing.assert_allclose(stats.plain_loss, plain, rtol=1e-5)
    return float(loss)


def test_the_floor_of_the_positives_is_their_number(batch):
    norms, terms, targets, used = examples(*batch)
    expected = harmonized_mean(norms, terms, used, floor=targets.sum())
    assert value_of(variants.floor_of_positives, batch) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(harmonized_mean(norms, terms, used, floor=300.0), rel=1e-3)


def test_the_smoothed_histogram_is_a_mean_over_five_bins(batch):
    def smooth(bins):
        seen = np.bincount(bins, minlength=BINS)
        weights = {-2: 1, -1: 2, 0: 3, 1: 2, 2: 1}
        total = np.zeros(BINS)
        for i in range(BINS):
            for offset, weight in weights.items():
                j = i + offset  # beyond an end, the histogram is mirrored
                j = -1 - j if j < 0 else 2 * BINS - 1 - j if j >= BINS else j
                total[i] += weight * seen[j] / 9
        assert total.sum() == pytest.approx(seen.sum())
        return total

    norms, terms, _, used = examples(*batch)
    expected = harmonized_mean(norms, terms, used, floor=0.0, counts=smooth)
    assert value_of(variants.smoothed, batch) == pytest.approx(expected, rel=1e-4)


def test_positives_and_negatives_have_histograms_of_their_own(batch):
    norms, terms, targets, used = examples(*batch)
    halves = [
        harmonized_mean(norms, terms, used & (targets == which), floor=100.0) for which in (1, 0)
    ]
    found = value_of(variants.apart, batch, bins=2 * BINS)
    assert found == pytest.approx(np.mean(halves), rel=1e-4)


@pytest.mark.parametrize(("step", "strength"), [(0, 1.0), (300, 0.5 + 0.5 / np.e), (5000, 0.5)])
def test_the_strength_falls_from_one_to_a_half(batch, step, strength):
    norms, terms, _, used = examples(*batch)
    # The histogram so far is this batch's: a moving average of equal batches, corrected.
    seen = np.bincount(np.minimum(norms[used] * BINS, BINS - 1).astype(int), minlength=BINS)
    counts = jnp.asarray(seen * (1 - MOMENTUM**step), jnp.float32)
    state = GHMState(counts, jnp.asarray(step))
    expected = harmonized_mean(norms, terms, used, floor=100.0, strength=strength)
    assert float(variants.falling(*batch, None, state)[0]) == pytest.approx(expected, rel=1e-3)


def test_the_loss_per_object_is_divided_by_the_positives(batch):
    norms, terms, targets, used = examples(*batch)
    mean = harmonized_mean(norms, terms, used, floor=100.0)
    expected = mean * used.sum() / targets.sum()
    assert value_of(variants.per_object, batch) == pytest.approx(expected, rel=1e-4)


def test_each_class_has_a_histogram_and_a_share_of_the_floor(batch):
    norms, terms, _, used = examples(*batch)
    of_class = [
        harmonized_mean(norms[..., k], terms[..., k], used[..., k], floor=100 / CLASSES)
        for k in range(CLASSES)
    ]
    found = value_of(variants.by_class, batch, bins=CLASSES * BINS)
    assert found == pytest.approx(np.mean(of_class), rel=1e-4)


@pytest.mark.parametrize("min_count", [0.0, 100.0])
def test_replicas_count_their_own_images(batch, min_count):
    function = functools.partial(variants.of_replicas, replicas=2, min_count=min_count)
    norms, terms, _, used = examples(*batch)
    halves = [
        harmonized_mean(norms[half], terms[half], used[half], floor=min_count / 2)
        for half in (slice(0, 2), slice(2, 4))
    ]
    assert value_of(function, batch, bins=2 * BINS) == pytest.approx(np.mean(halves), rel=1e-4)


def test_every_variant_of_the_plan_exists_and_is_differentiable(batch):
    names = {
        (entry.changes["loss.classification"], entry.changes["loss.ghm_c.bins"])
        for question in QUESTIONS
        for entry in question.entries
        if ":" in entry.changes.get("loss.classification", "")
    }
    assert len(names) == 10
    ten_classes = [np.repeat(x, 4, axis=-1)[..., :10] for x in batch[0]]
    for name, bins in names:
        module, _, function = name.partition(":")
        loss = getattr(importlib.import_module(module), function)
        gradient = jax.grad(
            lambda logits, loss=loss, bins=bins: loss(logits, batch[1], None, init_ghm_state(bins))[
                0
            ]
        )(ten_classes)
        assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in gradient), name

"""Targets of anchors against the published rule, written out anchor by anchor.

Corners are small integers: then overlaps are exact in float32 up to one rounding, so that ties and
thresholds occur and are decided the same way as in the oracle.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghm_jax.batch import NO_CLASS
from ghm_jax.detection.anchors import make_anchors
from ghm_jax.detection.matching import BACKGROUND, IGNORE, match_anchors

match = jax.jit(functools.partial(match_anchors, positive_iou=0.5, negative_iou=0.4))


def draw(rng, count: int) -> np.ndarray:
    low = rng.integers(0, 24, (count, 2))
    return np.float32(np.concatenate([low, low + rng.integers(1, 12, (count, 2))], axis=1))


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = float(width * height)
    return shared / (float((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])) - shared)


def deltas(anchor, box) -> np.ndarray:
    shift = (box[:2] + box[2:] - anchor[:2] - anchor[2:]) / 2
    sides, anchor_sides = box[2:] - box[:2], anchor[2:] - anchor[:2]
    return np.concatenate([shift / anchor_sides, np.log(sides / anchor_sides)])


def oracle(anchors, boxes, labels, positive=0.5, negative=0.4):
    """mmdetection's MaxIoUAssigner with min_pos_iou 0 and all best anchors, as box or class."""
    real = [m for m, label in enumerate(labels) if label >= 0]
    iou = {m: [overlap(anchor, boxes[m]) for anchor in anchors] for m in real}
    chosen = []
    for a in range(len(anchors)):
        best = max((iou[m][a] for m in real), default=0.0)
        if best >= positive:
            chosen.append(next(m for m in real if iou[m][a] == best))
        else:
            chosen.append(BACKGROUND if best < negative else IGNORE)
    for m in real:
        best = max(iou[m])
        for a in range(len(anchors)):
            if best > 0 and iou[m][a] == best:
                chosen[a] = m
    return chosen


def padded(boxes, labels, size: int = 8):
    rest = size - len(boxes)
    boxes = np.concatenate([boxes, np.zeros((rest, 4), np.float32)])
    return boxes, np.concatenate([labels, np.full(rest, -1)]).astype(np.int32)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_matching_equals_the_published_rule(rng, count):
    for _ in range(5):
        anchors = draw(rng, 150)
        boxes, labels = padded(draw(rng, count), rng.integers(0, 20, count))
        targets = match(anchors, boxes, labels)
        chosen = oracle(anchors, boxes, labels)
        classes = [labels[m] if m >= 0 else m for m in chosen]
        np.testing.assert_array_equal(targets.classes, classes)
        for a, m in enumerate(chosen):
            want = deltas(anchors[a], boxes[m]) if m >= 0 else np.zeros(4)
            np.testing.assert_allclose(targets.deltas[a], want, rtol=1e-5, atol=1e-6)


def overlaps_in_float32(anchors, boxes) -> np.ndarray:
    """IoU f32[A, M] with every operation rounded to float32."""
    a, b = anchors[:, None], boxes[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = np.maximum(high - low, 0).prod(axis=-1)
    sizes = [(x[..., 2:] - x[..., :2]).prod(axis=-1) for x in (a, b)]
    return shared / (sizes[0] + sizes[1] - shared)


def test_near_ties_are_decided_as_rounded_operations_decide_them(rng):
    """With fused multiply-adds, as XLA may use, more or fewer anchors have "the" best overlap."""
    anchors = make_anchors((96, 128), 2.0, 3, (0.5, 1.0, 2.0))
    for count in (5, 40):
        low = rng.uniform(0, 90, (count, 2))
        drawn = np.float32(np.concatenate([low, low + rng.uniform(5, 60, (count, 2))], axis=1))
        boxes, labels = padded(drawn, rng.integers(0, 20, count), size=50)
        overlaps = overlaps_in_float32(anchors, drawn)
        claims = overlaps == overlaps.max(axis=0)
        last = np.where(claims, np.arange(count), -1).max(axis=1)
        chosen = np.where(last >= 0, last, overlaps.argmax(axis=1))
        positive = (last >= 0) | (overlaps.max(axis=1) >= 0.5)
        rest = np.where(overlaps.max(axis=1) < 0.4, BACKGROUND, IGNORE)
        classes = np.where(positive, labels[chosen], rest)
        np.testing.assert_array_equal(match(anchors, boxes, labels).classes, classes)


def test_image_without_boxes_is_all_background(rng):
    boxes, labels = padded(np.zeros((0, 4), np.float32), np.zeros(0))
    targets = match(draw(rng, 150), boxes, labels)
    assert (np.asarray(targets.classes) == BACKGROUND).all()


def test_padding_never_matches(rng):
    anchors = draw(rng, 150)
    boxes, labels = padded(draw(rng, 3), rng.integers(0, 20, 3))
    want = match(anchors, boxes, labels)
    boxes[3:] = anchors[:5]  # would fit perfectly
    jax.tree.map(np.testing.assert_array_equal, match(anchors, boxes, labels), want)


def test_thresholds_and_the_band_between():
    #        IoU 0.5 exactly   0.45            0.4 exactly       just below       none
    corners = [[0, 0, 10, 5], [0, 0, 9, 5], [0, 0, 10, 4], [0, 0, 10, 3], [50, 50, 60, 60]]
    box, rival = [0, 0, 10, 10], [0, 0, 10, 10]  # the box itself is an anchor and takes the claim
    anchors = np.float32([*corners, rival])
    boxes, labels = padded(np.float32([box]), np.array([7]))
    classes = match(anchors, boxes, labels).classes
    assert classes.tolist() == [7, IGNORE, IGNORE, BACKGROUND, BACKGROUND, 7]


def test_equal_claims_go_to_the_last_box_and_all_best_anchors_are_taken():
    anchors = np.float32([[0, 0, 4, 4], [6, 0, 10, 4], [20, 20, 24, 24]])
    boxes = np.float32([[2, 0, 8, 4], [2, 0, 8, 4]])  # overlaps the first two alike, IoU 0.25
    boxes, labels = padded(boxes, np.array([3, 5]))
    assert match(anchors, boxes, labels).classes.tolist() == [5, 5, BACKGROUND]


def test_equal_overlaps_without_a_claim_go_to_the_first_box():
    anchors = np.float32([[0, 0, 10, 10], [0, 0, 10, 8]])  # the first one takes the claims
    boxes, labels = padded(np.float32([[0, 0, 10, 10]] * 2), np.array([3, 5]))
    assert match(anchors, boxes, labels).classes.tolist() == [5, 3]


def test_every_box_that_touches_an_anchor_has_one(rng):
    """In a batch under jit, where the two uses of an overlap must still be the same number."""
    cells = np.arange(8)[:, None] * 50.0  # boxes far apart, which do not compete
    low = cells + rng.uniform(10, 30, (64, 8, 2))
    boxes = np.float32(np.concatenate([low, low + rng.uniform(0.1, 20, low.shape)], axis=-1))
    labels = np.tile(np.arange(8, dtype=np.int32), (64, 1))
    low = (cells + rng.uniform(0, 40, (8, 40, 2)).transpose(1, 0, 2)).reshape(-1, 2)
    anchors = np.float32(np.concatenate([low, low + rng.uniform(3, 20, low.shape)], axis=-1))
    classes = jax.jit(jax.vmap(match_anchors, (None, 0, 0)))(anchors, boxes, labels).classes
    for row, image in zip(np.asarray(classes), boxes, strict=True):
        touched = [any(overlap(anchor, box) > 0 for anchor in anchors) for box in image]
        assert set(np.flatnonzero(touched)) <= set(row)


def torchvision_oracle(anchors, boxes, labels):
    """torchvision's Matcher(0.5, 0.4, allow_low_quality_matches=True), written out: claimed anchors
    get back the box that they overlap most."""
    real = [m for m, label in enumerate(labels) if label >= 0]
    chosen = []
    for anchor in anchors:
        overlaps = [overlap(anchor, boxes[m]) for m in real]
        best = max(overlaps, default=0.0)
        nearest = real[overlaps.index(best)] if real else BACKGROUND
        claimed = any(
            own > 0 and own == max(overlap(other, boxes[m]) for other in anchors)
            for own, m in zip(overlaps, real, strict=True)
        )
        if claimed or best >= 0.5:
            chosen.append(nearest)
        else:
            chosen.append(BACKGROUND if best < 0.4 else IGNORE)
    return chosen


@pytest.mark.parametrize("count", [1, 8])
def test_matching_equals_the_rule_of_torchvision(rng, count):
    match = jax.jit(functools.partial(match_anchors, convention="torchvision"))
    anchors = draw(rng, 60)
    boxes, labels = padded(draw(rng, count), np.arange(count))
    targets = match(anchors, boxes, labels)
    chosen = torchvision_oracle(anchors, boxes, labels)
    np.testing.assert_array_equal(targets.classes, [labels[m] if m >= 0 else m for m in chosen])
    for a, m in enumerate(chosen):
        want = deltas(anchors[a], boxes[m]) if m >= 0 else np.zeros(4)
        np.testing.assert_allclose(targets.deltas[a], want, rtol=1e-5, atol=1e-6)


def test_conventions_differ_on_a_claimed_anchor_that_overlaps_another_box_more():
    anchors = np.float32([[0, 0, 10, 10], [30, 0, 40, 10]])
    #                     IoU 0.6 with the first anchor, and 0.1, which is the most it has
    boxes, labels = padded(np.float32([[0, 0, 10, 6], [0, 0, 10, 1]]), np.array([3, 5]))
    for convention, expected in (("mmdetection", 5), ("torchvision", 3)):
        classes = match_anchors(anchors, boxes, labels, convention=convention).classes
        assert classes.tolist() == [expected, BACKGROUND]


@pytest.mark.parametrize("crowds", [1, 3])
def test_anchors_in_a_crowd_are_ignored_unless_positive(rng, crowds):
    boxes, labels = draw(rng, 8), rng.integers(0, 20, 8).astype(np.int32)
    anchors, is_crowd = draw(rng, 200), np.zeros(8, bool)
    is_crowd[rng.permutation(8)[:crowds]] = True
    labels[is_crowd] = NO_CLASS
    expected = []
    for anchor, m in zip(anchors, oracle(anchors, boxes, labels), strict=True):
        area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
        covered = False
        for box in boxes[is_crowd]:
            width = min(anchor[2], box[2]) - max(anchor[0], box[0])
            height = min(anchor[3], box[3]) - max(anchor[1], box[1])
            covered |= max(width, 0) * max(height, 0) / area >= 0.5
        expected.append(labels[m] if m >= 0 else IGNORE if covered else m)
    targets = match(anchors, boxes, labels, is_crowd)
    np.testing.assert_array_equal(targets.classes, expected)
    assert not np.asarray(targets.deltas)[np.array(expected) < 0].any()


def test_an_anchor_half_in_a_crowd_is_ignored_or_without_is_crowd_background():
    crowd = [0, 0, 10, 10]
    #          a half         just less        all of it      all of the crowd, little of the anchor
    corners = [[5, 0, 15, 10], [5.1, 0, 15.1, 10], [2, 2, 4, 4], [0, 0, 40, 40]]
    boxes, labels = padded(np.float32([crowd]), np.array([NO_CLASS]))
    is_crowd = np.arange(8) == 0
    classes = match_anchors(np.float32(corners), boxes, labels, is_crowd).classes
    assert classes.tolist() == [IGNORE, BACKGROUND, IGNORE, BACKGROUND]
    classes = match_anchors(np.float32(corners), boxes, labels).classes
    assert classes.tolist() == [BACKGROUND] * 4


def test_result_types():
    targets = match(jnp.zeros((150, 4)), jnp.zeros((8, 4)), jnp.full(8, -1))
    assert targets.classes.dtype == jnp.int32
    assert targets.deltas.dtype == jnp.float32

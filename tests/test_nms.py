"""Suppression and the choice of detections against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghm_jax.nms import select_detections, suppress

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 64
suppressed = jax.jit(suppress)


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = float(width * height)
    return shared / (float((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])) - shared)


def greedy(boxes, classes, valid, iou) -> list[bool]:
    kept: list[int] = []
    for i in np.flatnonzero(valid):
        rivals = [k for k in kept if classes[k] == classes[i]]
        if not any(overlap(boxes[k], boxes[i]) > iou for k in rivals):
            kept.append(int(i))
    return [i in kept for i in range(len(boxes))]


def padded(boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of one class and zeros after them."""
    rows = np.zeros((SIZE, 4), np.float32)
    rows[: len(boxes)] = np.reshape(boxes, (-1, 4))
    return rows, np.zeros(SIZE, np.int32), np.arange(SIZE) < len(boxes)


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_suppression_is_the_greedy_loop(rng, classes, iou):
    for _ in range(10):
        # Whole numbers in a small field: many overlaps, ties and overlaps of exactly 0.5.
        low = rng.integers(0, 8, (SIZE, 2))
        boxes = np.float32(np.concatenate([low, low + rng.integers(1, 8, (SIZE, 2))], axis=1))
        labels = rng.integers(0, classes, SIZE).astype(np.int32)
        valid = rng.uniform(size=SIZE) < 0.9
        kept = suppressed(boxes, labels, valid, iou)
        assert kept.tolist() == greedy(boxes, labels, valid, iou)


def test_a_suppressed_box_suppresses_nothing():
    # Each overlaps its neighbours by 6/14 and nothing else: every second one stays.
    boxes = [[4 * i, 0, 4 * i + 10, 10] for i in range(9)]
    kept = suppressed(*padded(boxes), 0.4)
    assert kept[:9].tolist() == [True, False] * 4 + [True]
    assert not kept[9:].any()


def test_longest_chain_is_followed_to_its_end():
    boxes = [[4 * i, 0, 4 * i + 10, 10] for i in range(SIZE)]
    assert suppressed(*padded(boxes), 0.4).tolist() == [True, False] * (SIZE // 2)


def test_identical_boxes_leave_the_first():
    assert suppressed(*padded([[0, 0, 5, 5]] * SIZE), 0.5).tolist() == [True] + [False] * (SIZE - 1)


def test_overlap_of_exactly_the_threshold_stays():
    assert suppressed(*padded([[0, 0, 10, 10], [0, 0, 10, 5]]), 0.5)[:2].all()


def test_nothing_valid_keeps_nothing():
    assert not suppressed(*padded([]), 0.5).any()


LEVELS = (12, 4, 1)
CLASSES = 3
SETTINGS = {"score_threshold": 0.3, "candidates": 8, "nms_iou": 0.5, "max_detections": 5}
IMAGE = np.array([60, 90], np.int32)


@functools.cache
def selected(**changes):
    function = functools.partial(select_detections, level_sizes=LEVELS, **SETTINGS | changes)
    return jax.jit(function)


def draw(rng):
    size = sum(LEVELS)
    low = rng.uniform(-5, 60, (size, 2))
    anchors = np.float32(np.concatenate([low, low + rng.uniform(15, 40, (size, 2))], axis=1))
    deltas = np.float32(rng.normal(0, 0.3, (size, 4)))
    return np.float32(rng.normal(0, 1.5, (size, CLASSES))), deltas, anchors


def oracle(logits, deltas, anchors):
    """[(score, class, box)] in plain Python, float64."""
    candidates, start = [], 0
    for size in LEVELS:
        pairs = [(logits[a, k], -a, k) for a in range(start, start + size) for k in range(CLASSES)]
        candidates += sorted(pairs, reverse=True)[: SETTINGS["candidates"]]
        start += size
    kept = []
    for logit, a, k in sorted(candidates, reverse=True)[: SETTINGS["candidates"]]:
        score = 1 / (1 + np.exp(-np.float64(logit)))
        x0, y0, x1, y1 = np.float64(anchors[-a])
        dx, dy, dw, dh = np.float64(deltas[-a])
        x, y = (x0 + x1) / 2 + dx * (x1 - x0), (y0 + y1) / 2 + dy * (y1 - y0)
        w, h = (x1 - x0) * np.exp(dw), (y1 - y0) * np.exp(dh)
        corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        box = np.clip(corners, 0, [90, 60, 90, 60])
        rivals = [other for _, label, other in kept if label == k]
        alone = all(overlap(other, box) <= SETTINGS["nms_iou"] for other in rivals)
        if score > SETTINGS["score_threshold"] and alone:
            kept.append((score, k, box))
    return kept[: SETTINGS["max_detections"]]


def test_detections_equal_the_plain_loop(rng):
    for _ in range(20):
        logits, deltas, anchors = draw(rng)
        boxes, scores, labels = selected()(logits, deltas, anchors, IMAGE)
        want = oracle(logits, deltas, anchors)
        assert boxes.shape == (5, 4)
        count = len(want)
        np.testing.assert_allclose(scores[:count], [score for score, _, _ in want], rtol=1e-5)
        assert labels[:count].tolist() == [label for _, label, _ in want]
        if want:
            expected = np.stack([box for _, _, box in want])
            np.testing.assert_allclose(boxes[:count], expected, rtol=1e-4, atol=1e-3)
        assert not np.any(scores[count:])
        assert not np.any(boxes[count:])
        assert (np.asarray(labels[count:]) == -1).all()
        assert (np.diff(scores) <= 0).all()


def test_scores_below_the_threshold_give_unused_rows(rng):
    _, deltas, anchors = draw(rng)
    logits = np.full((sum(LEVELS), CLASSES), -3, np.float32)
    boxes, scores, labels = selected()(logits, deltas, anchors, IMAGE)
    assert not np.any(boxes)
    assert not np.any(scores)
    assert labels.tolist() == [-1] * 5


def test_one_place_may_hold_several_classes_but_not_one_twice():
    logits = np.full((sum(LEVELS), CLASSES), -9, np.float32)
    logits[0], logits[1, 0] = [3, 2, 1], 2.5
    anchors = np.tile(np.float32([10, 10, 50, 50]), (sum(LEVELS), 1))
    _, scores, labels = selected()(logits, np.zeros_like(anchors), anchors, IMAGE)
    assert labels.tolist() == [0, 1, 2, -1, -1]
    np.testing.assert_allclose(scores[:3], 1 / (1 + np.exp([-3.0, -2, -1])), rtol=1e-5)


def test_images_without_enough_candidates_keep_the_shape(rng):
    boxes, scores, labels = selected(max_detections=100, candidates=1000)(*draw(rng), IMAGE)
    assert boxes.shape == (100, 4)
    assert scores.shape == labels.shape == (100,)
    assert (np.asarray(labels[51:]) == -1).all()


def test_nonfinite_scores_are_no_detections(rng):
    logits, deltas, anchors = draw(rng)
    logits[:] = np.nan
    assert not np.any(selected()(logits, deltas, anchors, IMAGE).scores)


def test_batch_equals_image_by_image(rng):
    images = [draw(rng) for _ in range(3)]
    sizes = jnp.array([[60, 90], [40, 40], [90, 60]])
    stacked = [np.stack(parts) for parts in zip(*images, strict=True)]
    got = jax.jit(jax.vmap(selected()))(*stacked, sizes)
    for i, image in enumerate(images):
        want = selected()(*image, sizes[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), got, want)

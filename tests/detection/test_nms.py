"""Suppression and the choice of detections against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghm_jax.detection.nms import select_detections, suppress

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 64


@functools.cache
def suppressed(**settings):
    return jax.jit(functools.partial(suppress, **settings))


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = float(width * height)
    return shared / (float((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])) - shared)


def plain(boxes, scores, classes, *, count, threshold, iou, soft_sigma=0.0, agnostic=False):
    """[(position, score)] by the definition, in float64."""
    left = {i: float(score) for i, score in enumerate(scores) if score > threshold}
    picked = []
    while left and len(picked) < count:
        pick = min(left, key=lambda i: (-left[i], i))
        picked.append((pick, left.pop(pick)))
        for i in list(left):
            if not agnostic and classes[i] != classes[pick]:
                continue
            both = overlap(np.float64(boxes[pick]), np.float64(boxes[i]))
            if soft_sigma > 0:
                left[i] *= np.exp(-(both**2) / soft_sigma)
                if left[i] <= threshold:
                    del left[i]
            elif both > iou:
                del left[i]
    return picked


def check(boxes, scores, classes, **settings):
    picks, found = suppressed(**settings)(boxes, scores, classes)
    want = plain(boxes, scores, classes, **settings)
    assert picks[: len(want)].tolist() == [pick for pick, _ in want]
    np.testing.assert_allclose(found[: len(want)], [score for _, score in want], rtol=1e-4)
    assert not np.any(found[len(want) :])
    return [pick for pick, _ in want]


HARD = {"count": SIZE, "threshold": 0.1, "iou": 0.5}


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 1.0])
def test_suppression_is_the_greedy_loop(rng, agnostic, iou):
    for _ in range(10):
        # Integers in a small range: many overlaps, ties and overlaps of exactly 0.5.
        low = rng.integers(0, 8, (SIZE, 2))
        boxes = np.float32(np.concatenate([low, low + rng.integers(1, 8, (SIZE, 2))], axis=1))
        scores = np.float32(rng.integers(0, 12, SIZE) / 12)  # with ties, some below
        classes = rng.integers(0, 3, SIZE).astype(np.int32)
        check(boxes, scores, classes, **HARD | {"iou": iou, "agnostic": agnostic})
        check(boxes, scores, classes, **HARD | {"iou": iou, "agnostic": agnostic, "count": 5})


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_soft_suppression_is_the_loop_with_lowered_scores(rng, agnostic, sigma):
    for _ in range(10):
        low = rng.uniform(0, 8, (SIZE, 2))
        boxes = np.float32(np.concatenate([low, low + rng.uniform(1, 8, (SIZE, 2))], axis=1))
        classes = rng.integers(0, 3, SIZE).astype(np.int32)
        scores = np.float32(rng.uniform(0, 1, SIZE))
        check(boxes, scores, classes, **HARD, soft_sigma=sigma, agnostic=agnostic)


def in_a_row(boxes, **settings):
    """Picks of boxes of one class with descending scores."""
    boxes = np.float32(boxes)
    scores = np.linspace(0.9, 0.2, len(boxes)).astype(np.float32)
    return check(boxes, scores, np.zeros(len(boxes), np.int32), **HARD | settings)


def test_a_suppressed_box_suppresses_nothing():
    # Each overlaps its neighbours by 6/14 and nothing else: every second one stays.
    boxes = [[4 * i, 0, 4 * i + 10, 10] for i in range(SIZE)]
    assert in_a_row(boxes, iou=0.4) == list(range(0, SIZE, 2))


def test_identical_boxes_leave_the_first():
    assert in_a_row([[0, 0, 5, 5]] * SIZE) == [0]
    boxes, same = np.tile(np.float32([0, 0, 5, 5]), (SIZE, 1)), np.full(SIZE, 0.5, np.float32)
    assert check(boxes, same, np.zeros(SIZE, np.int32), **HARD) == [0]


def test_overlap_of_exactly_the_threshold_stays():
    assert in_a_row([[0, 0, 10, 10], [0, 0, 10, 5]]) == [0, 1]


def test_boxes_without_area_suppress_nothing():
    assert in_a_row([[3, 3, 3, 3]] * 4) == [0, 1, 2, 3]


def test_nothing_above_the_threshold_gives_no_pick():
    boxes, low = np.ones((SIZE, 4), np.float32), np.full(SIZE, 0.1, np.float32)
    assert check(boxes, low, np.zeros(SIZE, np.int32), **HARD) == []


LEVELS = (12, 4, 1)
CLASSES = 3
SETTINGS = {"score_threshold": 0.3, "candidates": 8, "nms_iou": 0.5, "max_detections": 5}
IMAGE = np.array([60, 90], np.int32)


@functools.cache
def selected(**changes):
    def of_all(logits, deltas, anchors, image_size):
        ends = np.cumsum(LEVELS)[:-1]
        levels = (jnp.split(jnp.asarray(x), ends) for x in (logits, deltas))
        return select_detections(*levels, anchors, image_size, **SETTINGS | changes)

    return jax.jit(of_all)


def draw(rng):
    size = sum(LEVELS)
    low = rng.uniform(-5, 60, (size, 2))
    anchors = np.float32(np.concatenate([low, low + rng.uniform(15, 40, (size, 2))], axis=1))
    deltas = np.float32(rng.normal(0, 0.3, (size, 4)))
    return np.float32(rng.normal(0, 1.5, (size, CLASSES))), deltas, anchors


def oracle(logits, deltas, anchors, **changes):
    """[(score, class, box)] in plain Python, float64."""
    settings = SETTINGS | changes
    candidates, start = [], 0
    for size in LEVELS:
        pairs = [(-logits[a, k], a, k) for a in range(start, start + size) for k in range(CLASSES)]
        candidates += sorted(pairs)[: settings["candidates"]]
        start += size
    scores = [1 / (1 + np.exp(np.float64(negative))) for negative, _, _ in candidates]
    anchor, labels = [a for _, a, _ in candidates], [k for _, _, k in candidates]
    x0, y0, x1, y1 = np.float64(anchors[anchor]).T
    dx, dy, dw, dh = np.float64(deltas[anchor]).T
    x, y = (x0 + x1) / 2 + dx * (x1 - x0), (y0 + y1) / 2 + dy * (y1 - y0)
    w, h = (x1 - x0) * np.exp(dw), (y1 - y0) * np.exp(dh)
    corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
    boxes = np.clip(corners, 0, [90, 60, 90, 60])
    picked = plain(
        *(boxes, scores, labels),
        count=settings["max_detections"],
        threshold=settings["score_threshold"],
        iou=settings["nms_iou"],
        soft_sigma=settings.get("soft_sigma", 0.0),
        agnostic=settings.get("agnostic", False),
    )
    return [(score, labels[i], boxes[i]) for i, score in picked]


VARIANTS = [{}, {"agnostic": True}, {"soft_sigma": 0.5}, {"max_detections": 20}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_detections_equal_the_plain_loop(rng, changes):
    for i in range(20):
        logits, deltas, anchors = draw(rng)
        if i % 2 and "soft_sigma" not in changes:  # ties; no -0, which top_k puts last
            logits = np.round(logits) + 0.0
        boxes, scores, labels = selected(**changes)(logits, deltas, anchors, IMAGE)
        want = oracle(logits, deltas, anchors, **changes)
        assert boxes.shape == ((SETTINGS | changes)["max_detections"], 4)
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


def test_one_place_may_hold_several_classes_but_each_only_once():
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


def test_candidates_of_every_level_count():
    """At most 8 candidates per level, but more than 8 from the three levels together."""
    logits = np.full((sum(LEVELS), CLASSES), 2, np.float32)
    anchors = np.float32([[30 * i, 10, 30 * i + 20, 50] for i in range(sum(LEVELS))])  # apart
    image = np.array([60, 30 * sum(LEVELS)], np.int32)
    found = selected(max_detections=40)(logits, np.zeros_like(anchors), anchors, image)
    assert (np.asarray(found.scores) > 0).sum() == 8 + 8 + 3
    starts = np.asarray(found.boxes[:19, 0]) / 30
    # Equal scores: the first pairs of each level, in order.
    want = [i // 3 for i in range(8)] + [12 + i // 3 for i in range(8)] + [16] * 3
    np.testing.assert_allclose(starts, want, atol=1e-5)
    assert found.labels[:19].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] * 2 + [0, 1, 2]


def test_nonfinite_scores_are_not_detections(rng):
    logits, deltas, anchors = draw(rng)
    logits[:] = np.nan
    assert not np.any(selected()(logits, deltas, anchors, IMAGE).scores)
    logits[3, 1] = 2.0  # the others do not displace this one
    for candidates in (SETTINGS["candidates"], 1):
        found = selected(candidates=candidates)(logits, deltas, anchors, IMAGE)
        assert found.labels.tolist() == [1, -1, -1, -1, -1]


def test_batch_equals_image_by_image(rng):
    images = [draw(rng) for _ in range(3)]
    sizes = jnp.array([[60, 90], [40, 40], [90, 60]])
    stacked = [np.stack(arrays) for arrays in zip(*images, strict=True)]
    got = jax.jit(jax.vmap(selected()))(*stacked, sizes)
    for i, image in enumerate(images):
        want = selected()(*image, sizes[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), got, want)

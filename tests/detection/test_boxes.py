"""Overlaps and box deltas, against a table, float64 formulas and pycocotools."""

import jax
import jax.numpy as jnp
import numpy as np
import pycocotools.mask
import pytest

from ghm_jax.detection.boxes import (
    box_area,
    box_coverage,
    box_iou,
    clip_boxes,
    columns,
    decode_boxes,
    encode_boxes,
)


def draw(rng, count: int) -> np.ndarray:
    corner = rng.uniform(0, 200, (count, 2))
    return np.float32(np.concatenate([corner, corner + rng.uniform(2, 100, (count, 2))], axis=1))


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 4, 2), (2, 0, 6, 2), 4 / 12),
        ((-5, -5, 5, 5), (0, 0, 5, 5), 0.25),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),  # touch
        ((0, 0, 10, 10), (20, 20, 30, 30), 0),
        ((0, 0, 10, 10), (5, 5, 5, 5), 0),  # a point
        ((0, 0, 10, 10), (8, 8, 2, 2), 0),  # inside out
        ((3, 3, 3, 3), (3, 3, 3, 3), 0),
    ],
)
def test_iou_table(a, b, iou):
    a, b = columns(jnp.array(a, float)), columns(jnp.array([b], float))
    np.testing.assert_allclose(box_iou(a, b), [iou], rtol=1e-6)
    np.testing.assert_allclose(box_iou(b, a), [iou], rtol=1e-6)


def test_iou_equals_pycocotools(rng):
    a, b = draw(rng, 40), draw(rng, 30)
    xywh = [np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], axis=1).astype(float) for x in (a, b)]
    want = pycocotools.mask.iou(*xywh, [0] * 30)
    pairs = columns(a[:, None]), columns(b[None])
    np.testing.assert_allclose(jax.jit(box_iou)(*pairs), want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(box_area(columns(a)), xywh[0][:, 2] * xywh[0][:, 3], rtol=1e-5)


def test_coverage_equals_pycocotools_on_crowds(rng):
    a, b = draw(rng, 40), draw(rng, 30)
    xywh = [np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], axis=1).astype(float) for x in (a, b)]
    want = pycocotools.mask.iou(*xywh, [1] * 30)
    pairs = columns(a[:, None]), columns(b[None])
    np.testing.assert_allclose(jax.jit(box_coverage)(*pairs), want, rtol=1e-4, atol=1e-6)
    empty = columns(jnp.array([5.0, 5, 5, 9]))
    np.testing.assert_array_equal(box_coverage(empty, columns(b)), np.zeros(30))


def test_deltas_are_shifts_and_log_ratios():
    anchor, box = jnp.array([10.0, 20, 30, 60]), jnp.array([20.0, 20, 60, 40])
    want = [(40 - 20) / 20, (30 - 40) / 40, np.log(40 / 20), np.log(20 / 40)]
    np.testing.assert_allclose(encode_boxes(box, anchor), want, rtol=1e-6)


def test_decode_is_the_inverse_of_encode(rng):
    boxes, anchors = draw(rng, 100).reshape(4, 25, 4), draw(rng, 100).reshape(4, 25, 4)
    deltas = encode_boxes(boxes, anchors)
    np.testing.assert_allclose(decode_boxes(deltas, anchors), boxes, rtol=1e-4, atol=1e-3)


def test_boxes_without_extent_have_finite_deltas():
    box = jnp.array([5.0, 5, 5, 4])
    assert np.isfinite(encode_boxes(box, jnp.array([0.0, 0, 10, 10]))).all()


def test_extreme_deltas_give_finite_boxes():
    anchor = jnp.array([0.0, 0, 16, 16])
    box = decode_boxes(jnp.array([0.0, 0, 1e30, 1e30]), anchor)
    np.testing.assert_allclose(box, [8 - 500, 8 - 500, 8 + 500, 8 + 500], rtol=1e-5)
    wild = jnp.array([[1e30, -1e30, 1e30, -1e30], [3e38, 3e38, 3e38, 3e38]])
    clipped = clip_boxes(decode_boxes(wild, anchor[None]), jnp.array([[100, 200]]))
    assert np.isfinite(clipped).all()


def test_boxes_are_clipped_to_height_and_width():
    boxes = jnp.array([[-5.0, -5, 300, 300], [10, 20, 30, 40], [250, 150, 260, 160]])
    want = [[0, 0, 200, 100], [10, 20, 30, 40], [200, 100, 200, 100]]
    np.testing.assert_array_equal(clip_boxes(boxes, jnp.array([[100, 200]])), want)

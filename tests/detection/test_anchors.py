"""Anchors against a written-out table and the figures of the published detector."""

import numpy as np
import pytest

from ghm_jax.detection.anchors import STRIDES, grid_shape, level_sizes, make_anchors


def test_table_of_one_cell():
    anchors = make_anchors((8, 16), scale=4.0, octaves=2, ratios=(0.25, 1.0))
    # 1 x 2 cells of P3, then one cell each of P4 to P7; sides 32 and 45.25 at stride 8.
    assert anchors.shape == ((2 + 4) * 4, 4)
    assert anchors.dtype == np.float32
    root2 = 2**0.5
    cell = [
        [-32, -8, 32, 8],
        [-32 * root2, -8 * root2, 32 * root2, 8 * root2],
        [-16, -16, 16, 16],
        [-16 * root2, -16 * root2, 16 * root2, 16 * root2],
    ]
    table = np.array(cell)
    np.testing.assert_allclose(anchors[:4], table, rtol=1e-6)
    np.testing.assert_allclose(anchors[4:8], table + np.array([8, 0, 8, 0]), rtol=1e-6)
    np.testing.assert_allclose(anchors[8:12], table * 2, rtol=1e-6)
    np.testing.assert_allclose(anchors[-4:], table * 16, rtol=1e-6)


def test_counts_of_the_published_input_size():
    grids = [grid_shape((800, 1344), stride) for stride in STRIDES]
    assert grids == [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    sizes = level_sizes((800, 1344), 9)
    assert sizes == tuple(9 * rows * columns for rows, columns in grids)
    anchors = make_anchors((800, 1344), scale=4.0, octaves=3, ratios=(0.5, 1.0, 2.0))
    assert len(anchors) == sum(sizes) == 201_600


def test_grids_are_those_of_convolutions_that_halve():
    for side in range(32, 1400, 32):
        cells = side // 8
        for stride in STRIDES:
            assert grid_shape((side, 64), stride)[0] == cells
            cells = (cells + 1) // 2


def test_order_is_that_of_head_outputs():
    """A head gives [rows, columns, anchors of a cell, 4] per level, reshaped to [A, 4]."""
    ratios, octaves, size = (0.5, 1.0, 2.0), 3, (96, 160)
    anchors = make_anchors(size, scale=4.0, octaves=octaves, ratios=ratios)
    start = 0
    for stride, count in zip(STRIDES, level_sizes(size, 9), strict=True):
        rows, columns = grid_shape(size, stride)
        level = anchors[start : start + count].reshape(rows, columns, len(ratios), octaves, 4)
        start += count
        center = (level[..., :2] + level[..., 2:]) / 2
        width, height = np.moveaxis(level[..., 2:] - level[..., :2], -1, 0)
        for row in range(rows):
            np.testing.assert_allclose(center[row, ..., 1], row * stride, atol=1e-3)
        for column in range(columns):
            np.testing.assert_allclose(center[:, column, ..., 0], column * stride, atol=1e-3)
        for i, ratio in enumerate(ratios):
            np.testing.assert_allclose(height[:, :, i] / width[:, :, i], ratio, rtol=1e-4)
        for i in range(octaves):
            area = (4 * stride * 2 ** (i / 3)) ** 2
            np.testing.assert_allclose((width * height)[..., i], area, rtol=1e-4)
    assert start == len(anchors)


@pytest.mark.parametrize("side", [1, 7, 31])
def test_tiny_images_have_one_cell_on_every_level(side):
    assert level_sizes((min(side, 8), min(side, 8)), 9) == (9,) * 5


def torchvision_anchors(height: int, width: int) -> np.ndarray:
    """Anchors of the published RetinaNet by torchvision's rules, one by one."""
    found = []
    for level in range(5):
        base, stride = 32 << level, 8 << level
        sizes = (base, int(base * 2 ** (1 / 3)), int(base * 2 ** (2 / 3)))
        rows, columns = -(-height // stride), -(-width // stride)
        for row in range(rows):
            for column in range(columns):
                x, y = column * (width // columns), row * (height // rows)
                for ratio in (0.5, 1.0, 2.0):
                    for size in sizes:
                        half_width = size / ratio**0.5 / 2
                        half_height = size * ratio**0.5 / 2
                        # round() of Python and of torch: halves go to the even neighbour
                        w, h = round(half_width), round(half_height)
                        found.append([x - w, y - h, x + w, y + h])
    return np.array(found, np.float32)


@pytest.mark.parametrize("size", [(64, 96), (224, 160), (800, 1088), (608, 1344)])
def test_torchvision_anchors_equal_the_loop(size):
    anchors = make_anchors(size, 4.0, 3, (0.5, 1.0, 2.0), "torchvision")
    assert anchors.dtype == np.float32
    np.testing.assert_array_equal(anchors, torchvision_anchors(*size))


def test_torchvision_anchors_equal_those_by_hand():
    anchors = make_anchors((800, 1088), 4.0, 3, (0.5, 1.0, 2.0), "torchvision")
    # 32, 40 and 50 pixels at P3; the height of 32 at ratio 0.5 is 22.6, so 11 to either side
    table = [[-23, -11, 23, 11], [-28, -14, 28, 14], [-35, -18, 35, 18], [-16, -16, 16, 16]]
    np.testing.assert_array_equal(anchors[:4], table)
    # P6 has 13 x 17 cells, 800 // 13 = 61 pixels apart; P7 7 x 9, 114 and 120.
    p7 = anchors[-7 * 9 * 9 :].reshape(7, 9, 9, 4)
    center = (p7[..., :2] + p7[..., 2:]) / 2
    np.testing.assert_array_equal(center[2, 3, 4], [3 * 120, 2 * 114])


def test_both_conventions_order_their_anchors_alike():
    exact, rounded = (
        make_anchors((224, 160), 4.0, 3, (0.5, 1.0, 2.0), convention)
        for convention in ("mmdetection", "torchvision")
    )
    sides = [x[:, 2:] - x[:, :2] for x in (exact, rounded)]
    assert np.abs(sides[0] - sides[1]).max() < 3  # two for the fraction, one for rounding

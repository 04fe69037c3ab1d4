"""Anchors against a written-out table and the figures of the published detector."""

import numpy as np
import pytest

from ghm_jax.anchors import STRIDES, grid_shape, level_sizes, make_anchors


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

"""Anchors of the feature pyramid: the same for every image of a padded size, hence NumPy."""

import numpy as np

STRIDES = (8, 16, 32, 64, 128)
"""Pixels per cell of the levels P3 to P7."""


def grid_shape(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Cells (rows, columns) of a level: the sides over the stride, rounded up at each halving."""
    height, width = image_size
    return -(-height // stride), -(-width // stride)


def level_sizes(image_size: tuple[int, int], per_cell: int) -> tuple[int, ...]:
    """Anchors per pyramid level for a padded image of (height, width) pixels."""
    grids = [grid_shape(image_size, stride) for stride in STRIDES]
    return tuple(rows * columns * per_cell for rows, columns in grids)


def make_anchors(
    image_size: tuple[int, int], scale: float, octaves: int, ratios: tuple[float, ...]
) -> np.ndarray:
    """Anchor boxes of all levels, P3 first.

    Within a level they run over rows, columns, then the anchors of a cell (ratio outer, octave
    inner: mmdetection's order), as the heads' outputs do. The first anchor of a level has its
    centre at pixel (0, 0), mmdetection >= 2.0's convention; its square anchors have sides
    `scale * stride * 2**(octave / octaves)`.

    Args:
        image_size: (height, width) of the padded image in pixels.
        scale: side of the smallest anchor in strides.
        octaves: sizes per level.
        ratios: height / width.

    Returns:
        f32[A, 4], x0, y0, x1, y1 in pixels; anchors may reach beyond the image.
    """
    root = np.sqrt(np.asarray(ratios, np.float64))[:, None]
    size = scale * 2.0 ** (np.arange(octaves) / octaves)
    width, height = (size / root).ravel(), (size * root).ravel()  # [ratios * octaves]
    cell = 0.5 * np.stack([-width, -height, width, height], axis=-1)  # in strides

    levels = []
    for stride in STRIDES:
        rows, columns = grid_shape(image_size, stride)
        y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        center = np.stack([x, y, x, y], axis=-1)[:, :, None, :]  # [rows, columns, 1, 4]
        levels.append((center + cell).reshape(-1, 4) * stride)
    return np.concatenate(levels).astype(np.float32)

"""Anchors of the feature pyramid: constants for each padded size, hence NumPy.

Two conventions, so that imported weights get the anchors they were trained with. In both, the first
anchors of a level are centered on pixel (0, 0). Within a level, anchors are ordered by row, column,
ratio, octave, like the outputs of the heads. With s = scale * stride (32 to 512 pixels as
published):

- "mmdetection" (2.0 and later, as in the published GHM models): sides s * 2**(i / octaves), exact;
  cells are `stride` pixels apart.
- "torchvision": sides s * 2**(i / octaves) are truncated to integers, and corner offsets from the
  center are rounded to integers (half to even); cells are side // cells pixels apart, separately
  for height and width. Where the last cell of P6 or P7 is partly outside the image, that is less
  than the stride: 800 // 13 = 61 for P6.

torchvision pads each image to the next multiple of 32 pixels, so its P6 and P7 anchor positions
depend on the image; here they depend on the padded size of the batch.
"""

from typing import Literal

import numpy as np

STRIDES = (8, 16, 32, 64, 128)
"""Pixels per cell of the levels P3 to P7."""

Convention = Literal["mmdetection", "torchvision"]


def grid_shape(padded_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Cells (rows, columns) of a level: height and width over the stride, rounded up."""
    height, width = padded_size
    return -(-height // stride), -(-width // stride)


def level_sizes(padded_size: tuple[int, int], per_cell: int) -> tuple[int, ...]:
    """Anchors per pyramid level for a padded image of (height, width) pixels."""
    grids = [grid_shape(padded_size, stride) for stride in STRIDES]
    return tuple(rows * columns * per_cell for rows, columns in grids)


def make_anchors(
    padded_size: tuple[int, int],
    scale: float,
    octaves: int,
    ratios: tuple[float, ...],
    convention: Convention = "mmdetection",
) -> np.ndarray:
    """Anchor boxes of all levels, P3 first, in the order described above.

    Args:
        padded_size: (height, width) of the padded image in pixels.
        scale: side of the smallest square anchor, in strides.
        octaves: sizes per level.
        ratios: height / width.
        convention: see the top of this file.

    Returns:
        f32[A, 4], x0, y0, x1, y1 in pixels; anchors may extend beyond the image.
    """
    levels = []
    for stride in STRIDES:
        rows, columns = grid_shape(padded_size, stride)
        sides = scale * stride * 2.0 ** (np.arange(octaves) / octaves)
        step_y = step_x = stride
        if convention == "torchvision":
            sides = np.trunc(sides).astype(np.float32)
            step_y, step_x = padded_size[0] // rows, padded_size[1] // columns
        root = np.sqrt(np.asarray(ratios, sides.dtype))[:, None]
        width, height = (1 / root * sides).ravel(), (root * sides).ravel()  # [ratios * octaves]
        cell = np.stack([-width, -height, width, height], axis=-1) / 2
        if convention == "torchvision":
            cell = np.round(cell)  # half to even, in float32, like torch.round
        y, x = np.meshgrid(np.arange(rows) * step_y, np.arange(columns) * step_x, indexing="ij")
        center = np.stack([x, y, x, y], axis=-1)[:, :, None, :]  # [rows, columns, 1, 4]
        levels.append((center + cell).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)

"""Anchors of the feature pyramid: the same for every image of a padded size, hence NumPy.

Two conventions, so that weights trained elsewhere meet the anchors that they were trained with. In
both the first anchors of a level are centred on pixel (0, 0), and within a level they run over
rows, columns, then the anchors of a cell (ratio outer, octave inner), as the heads' outputs do.
With s = scale * stride, 32 to 512 pixels as published:

- "mmdetection" (2.0 and later, so the published GHM models): sides s * 2**(i / octaves), exact;
  cells are `stride` pixels apart.
- "torchvision": s * 2**(i / octaves) without its fraction, and the corners of the anchors round
  their centre in whole pixels, halves to even; cells are side // cells pixels apart, in each
  direction by itself. Where P6 or P7 have a cell that is partly outside, that is less than the
  stride: 800 // 13 = 61 for P6.

torchvision pads an image to the next multiples of 32 pixels, so that there the places of its
anchors on P6 and P7 depend on the image; here on the padded size of the batch.
"""

from typing import Literal

import numpy as np

STRIDES = (8, 16, 32, 64, 128)
"""Pixels per cell of the levels P3 to P7."""

Convention = Literal["mmdetection", "torchvision"]


def grid_shape(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Cells (rows, columns) of a level: the sides over the stride, rounded up at each halving."""
    height, width = image_size
    return -(-height // stride), -(-width // stride)


def level_sizes(image_size: tuple[int, int], per_cell: int) -> tuple[int, ...]:
    """Anchors per pyramid level for a padded image of (height, width) pixels."""
    grids = [grid_shape(image_size, stride) for stride in STRIDES]
    return tuple(rows * columns * per_cell for rows, columns in grids)


def make_anchors(
    image_size: tuple[int, int],
    scale: float,
    octaves: int,
    ratios: tuple[float, ...],
    convention: Convention = "mmdetection",
) -> np.ndarray:
    """Anchor boxes of all levels, P3 first, in the order that the module describes.

    Args:
        image_size: (height, width) of the padded image in pixels.
        scale: side of the smallest square anchor in strides.
        octaves: sizes per level.
        ratios: height / width.
        convention: see the module.

    Returns:
        f32[A, 4], x0, y0, x1, y1 in pixels; anchors may reach beyond the image.
    """
    levels = []
    for stride in STRIDES:
        rows, columns = grid_shape(image_size, stride)
        sides = scale * stride * 2.0 ** (np.arange(octaves) / octaves)
        step_y = step_x = stride
        if convention == "torchvision":
            sides = np.trunc(sides).astype(np.float32)
            step_y, step_x = image_size[0] // rows, image_size[1] // columns
        root = np.sqrt(np.asarray(ratios, sides.dtype))[:, None]
        width, height = (1 / root * sides).ravel(), (root * sides).ravel()  # [ratios * octaves]
        cell = np.stack([-width, -height, width, height], axis=-1) / 2
        if convention == "torchvision":
            cell = np.round(cell)  # halves to even, of float32, as torch.round
        y, x = np.meshgrid(np.arange(rows) * step_y, np.arange(columns) * step_x, indexing="ij")
        center = np.stack([x, y, x, y], axis=-1)[:, :, None, :]  # [rows, columns, 1, 4]
        levels.append((center + cell).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)

"""Random images and boxes to time detectors with. Needs neither JAX nor ours."""

from typing import NamedTuple

import numpy as np

BOXES = 7
"""Per image, about COCO's average."""


class Noise(NamedTuple):
    """Images without any structure, and boxes in them."""

    images: np.ndarray
    """u8[b, H, W, 3]."""
    boxes: np.ndarray
    """f32[b, 7, 4], x0, y0, x1, y1 in pixels."""
    labels: np.ndarray
    """i32[b, 7], class indices."""


def make_noise(images: int, size: tuple[int, int], num_classes: int, seed: int = 0) -> Noise:
    """Noise for a number of images of `size` (height, width) in pixels."""
    rng, (height, width) = np.random.default_rng(seed), size
    corners = rng.uniform(0, 0.7, (images, BOXES, 2))
    sides = rng.uniform(0.05, 0.3, (images, BOXES, 2))
    scale = np.array([width, height, width, height])
    boxes = np.concatenate([corners, corners + sides], -1) * scale
    labels = rng.integers(0, num_classes, (images, BOXES))
    pixels = rng.integers(0, 256, (images, height, width, 3), np.uint8)
    return Noise(pixels, boxes.astype(np.float32), labels.astype(np.int32))

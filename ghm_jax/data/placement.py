"""How an image is scaled, cropped and flipped: drawn first, then applied to pixels and boxes."""

from typing import NamedTuple

import cv2
import numpy as np

from ghm_jax.config import Data
from ghm_jax.data.transforms import resized_size

Size = tuple[int, int]
"""(height, width) in pixels."""


class Placement(NamedTuple):
    """Scale an image, crop it, flip the crop: an affine map for each axis."""

    original: Size
    """Of the stored image."""
    scaled: Size
    """Of the whole image after scaling."""
    corner: tuple[int, int]
    """(top, left) of the crop, in scaled pixels."""
    size: Size
    """Of the crop."""
    mirrored: bool
    """Flipped horizontally."""

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from stored to placed pixels; x is negative if the image is flipped."""
        x, y = self.scaled[1] / self.original[1], self.scaled[0] / self.original[0]
        return (-x if self.mirrored else x), y

    @property
    def offset(self) -> tuple[float, float]:
        """(x, y) added after scaling, in placed pixels."""
        top, left = self.corner
        return float(left + self.size[1] if self.mirrored else -left), float(-top)

    def place_image(self, image: np.ndarray) -> np.ndarray:
        """uint8[H, W, 3] -> uint8[h, w, 3]"""
        if self.scaled != self.original:
            image = cv2.resize(image, self.scaled[::-1], interpolation=cv2.INTER_LINEAR)
        (top, left), (height, width) = self.corner, self.size
        image = image[top : top + height, left : left + width]
        # A reversed view would be copied later on, ten times as slowly.
        return cv2.flip(image, 1) if self.mirrored else image

    def place_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """f32[N, 4] (x0, y0, x1, y1) -> f32[N, 4], clipped to the crop.

        A box outside the crop comes out without width or height.
        """
        scale, offset = (np.array(pair * 2, np.float32) for pair in (self.scale, self.offset))
        placed = boxes * scale + offset
        if self.mirrored:
            placed = placed[:, [2, 1, 0, 3]]
        if self.size != self.scaled:
            placed = placed.clip(0, np.array(self.size[::-1] * 2, np.float32))
        return placed


def choose_placement(original: Size, data: Data, rng: np.random.Generator | None) -> Placement:
    """Draws the placement of one image.

    Args:
        original: its stored size.
        data: sides and probabilities.
        rng: of this image alone; None: no augmentation.
    """
    if rng is None:
        frame = resized_size(*original, data.short_side, data.long_side)
        return Placement(original, frame, (0, 0), frame, mirrored=False)
    # A disabled augmentation draws no number, so that enabling one leaves the others unchanged.
    mirrored = rng.random() < data.flip
    short_side = data.short_side
    if data.min_short_side:
        short_side = int(rng.integers(data.min_short_side, data.short_side + 1))
    frame = resized_size(*original, short_side, data.long_side)
    if data.zoom == (1.0, 1.0):
        return Placement(original, frame, (0, 0), frame, mirrored)
    zoom = rng.uniform(*data.zoom)
    height, width = (max(1, round(side * zoom)) for side in frame)
    size = min(height, frame[0]), min(width, frame[1])
    top, left = (int(rng.integers(n + 1)) for n in (height - size[0], width - size[1]))
    return Placement(original, (height, width), (top, left), size, mirrored)


def to_original(boxes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Boxes of a batch in pixels of the stored images, the inverse of `Placement.place_boxes`.

    Args:
        boxes: [..., N, 4], x0, y0, x1, y1 in pixels of the batch.
        scale: [..., 2], (x, y) per image.
        offset: [..., 2], (x, y) per image.
    """
    scale, offset = (np.concatenate([xy, xy], -1)[..., None, :] for xy in (scale, offset))
    corners = (boxes - offset) / scale
    return np.where(scale[..., :1] < 0, corners[..., [2, 1, 0, 3]], corners)

"""The embedded data set: real handwritten digits, mostly small, on textured backgrounds.

The digits are the 1,797 scans that come with scikit-learn. Train and validation scenes use
different scans. Most objects are small, which gives the imbalance that GHM addresses.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

from ghm_jax.data.schema import detection_features

SIDE = 160  # pixels of a scene
MIN_SIZE, MAX_SIZE = 16, 72  # height of a digit before rotation, in pixels
MAX_DIGITS = 17
MAX_OVERLAP = 0.1  # of the smaller of two boxes
INK = 0.3  # opacity from which a pixel belongs to the digit


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `digit_scenes`; needs no TensorFlow with `file_format="array_record"`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    SCENES: ClassVar[dict[str, int]] = {"train": 2500, "validation": 250}
    SEED = 0

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of many sizes on textured backgrounds.",
            features=detection_features([str(digit) for digit in range(10)]),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self.SCENES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        scans, digits = split_digits()[split]
        first_id = 1 + (self.SCENES["train"] if split == "validation" else 0)
        for index in range(self.SCENES[split]):
            rng = np.random.default_rng((self.SEED, list(self.SCENES).index(split), index))
            image, boxes, labels = draw_digits(draw_background(rng), scans, digits, rng)
            image_id = first_id + index
            yield image_id, _record(image_id, image, boxes, labels)


def _record(
    image_id: int, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    objects = []
    for number, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        x0, y0, x1, y1 = box
        objects.append(
            {
                "id": image_id * 100 + number + 1,
                "area": (x1 - x0) * (y1 - y0),
                "bbox": tfds.features.BBox(
                    ymin=y0 / SIDE, xmin=x0 / SIDE, ymax=y1 / SIDE, xmax=x1 / SIDE
                ),
                "label": label,
                "is_crowd": False,
            }
        )
    return {
        "image": encoded,
        "image/filename": f"{image_id:06d}.jpg",
        "image/id": image_id,
        "objects": objects,
    }


@functools.cache
def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scans of each split: f32[N, 8, 8] with 1 = ink, i64[N] digits; no scan is in both.

    About 78% of the scans of every digit are for training (1,402 scans; 395 for validation).
    """
    from sklearn.datasets import load_digits  # slow to import, needed for building only

    images, digits = load_digits(return_X_y=True)
    scans = images.reshape(-1, 8, 8).astype(np.float32) / 16
    rng = np.random.default_rng(0)
    train = np.zeros(len(digits), bool)
    for digit in range(10):
        of_digit = rng.permutation(np.flatnonzero(digits == digit))
        train[of_digit[: round(0.78 * len(of_digit))]] = True
    return {
        "train": (scans[train], digits[train]),
        "validation": (scans[~train], digits[~train]),
    }


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """f32[160, 160, 3] in 0..255: noise of several scales, a gradient, a few strokes."""
    colour = rng.uniform(120, 210) + rng.normal(0, 18, 3)
    image = np.full((1, 1, 3), colour, np.float32)
    for cells in (3, 7, 15, 40):  # coarse to fine: each scale adds to the one before
        noise = rng.standard_normal((cells, cells, 1)) + rng.normal(0, 0.5, (cells, cells, 3))
        image = cv2.resize(image, (cells, cells), interpolation=cv2.INTER_CUBIC)
        image += (rng.uniform(1, 9) * noise).astype(np.float32)
    image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)

    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-0.5, 0.5, SIDE)
    slope = np.cos(angle) * across + np.sin(angle) * across[:, None]
    grain = rng.random((SIDE, SIDE)) - 0.5
    shade = rng.uniform(0, 45) * slope + rng.uniform(0, 17) * grain
    for _ in range(rng.integers(0, 6)):
        stroke = np.zeros((SIDE, SIDE), np.uint8)
        points = rng.uniform(0, SIDE, 2) + np.cumsum(rng.normal(0, 30, (4, 2)), axis=0)
        thickness = int(rng.integers(1, 4))
        cv2.polylines(stroke, [points.astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
        shade += stroke * (rng.choice([-1, 1]) * rng.uniform(10, 35) / 255)
    image += cv2.cvtColor(shade.astype(np.float32), cv2.COLOR_GRAY2RGB)
    return image.clip(0, 255)


def draw_digits(
    background: np.ndarray, scans: np.ndarray, digits: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws 1 to 17 of the scans onto a background, with little overlap.

    Args:
        background: f32[160, 160, 3] in 0..255.
        scans: f32[N, 8, 8], 1 = ink.
        digits: i64[N].
        rng: decides everything.

    Returns:
        uint8[160, 160, 3], boxes i64[M, 4] x0, y0, x1, y1 tight around the ink, digits i64[M].
    """
    image = background.transpose(2, 0, 1).copy()  # [3, 160, 160]: faster to blend
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    count = rng.integers(2, MAX_DIGITS + 1)
    # Uniform in log size: small octaves are as frequent as large ones.
    sizes = np.exp(rng.uniform(np.log(MIN_SIZE), np.log(MAX_SIZE), count))
    for size in sorted(sizes.tolist(), reverse=True):  # large ones first, while there is room
        index = rng.integers(len(scans))
        opacity = _render(scans[index], size, rng)
        height, width = opacity.shape
        left, top, ink_width, ink_height = cv2.boundingRect((opacity > INK).view(np.uint8))
        for _ in range(20):
            x, y = int(rng.integers(SIDE - width + 1)), int(rng.integers(SIDE - height + 1))
            box = (x + left, y + top, x + left + ink_width, y + top + ink_height)
            if all(_overlap(box, other) <= MAX_OVERLAP for other in boxes):
                _blend(image[:, y : y + height, x : x + width], opacity, rng)
                boxes.append(box)
                labels.append(int(digits[index]))
                break
    image = np.rint(image).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(image), np.array(boxes), np.array(labels)


def _render(scan: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Opacity f32[h, w] in 0..1 of a scan, `size` pixels high, slightly slanted and rotated."""
    left, top, w, h = cv2.boundingRect((scan > 0.2).view(np.uint8))
    scan = np.ascontiguousarray(scan[top : top + h, left : left + w])
    angle, slant, stretch = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15), rng.uniform(0.9, 1.1)
    cos, sin = size / h * math.cos(angle), size / h * math.sin(angle)
    a, b = cos * stretch, cos * slant - sin  # x = a u + b v, y = c u + d v
    c, d = sin * stretch, sin * slant + cos
    width, height = int(abs(a) * w + abs(b) * h) + 3, int(abs(c) * w + abs(d) * h) + 3
    to_centre = [
        [a, b, (width - 1 - a * (w - 1) - b * (h - 1)) / 2],
        [c, d, (height - 1 - c * (w - 1) - d * (h - 1)) / 2],
    ]
    warped = cv2.warpAffine(scan, np.array(to_centre), (width, height), flags=cv2.INTER_CUBIC)
    ramp = np.clip((warped - 0.3) / 0.4, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _blend(patch: np.ndarray, opacity: np.ndarray, rng: np.random.Generator) -> None:
    """Draws a digit onto a patch (in place), with ink darker than the background there.

    Args:
        patch: f32[3, h, w] in 0..255.
        opacity: f32[h, w] in 0..1.
        rng: decides the ink.
    """
    local = (patch * opacity).sum(axis=(1, 2)) / opacity.sum()
    ink = local - rng.uniform(80, 150) + rng.normal(0, 12, 3)
    ink = ink.clip(0, 255).astype(np.float32)
    patch += opacity * (ink[:, None, None] - patch)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area of two boxes, as a fraction of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))

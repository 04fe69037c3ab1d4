"""Images and boxes, one at a time: decode, resize, flip. Pure functions of numpy arrays."""

import io

import cv2
import numpy as np
from PIL import Image


def decode_image(encoded: bytes) -> np.ndarray:
    """uint8[H, W, 3] RGB of an encoded image; grey images get three equal channels.

    Raises:
        ValueError: the bytes are no image.
    """
    # Orientation tags are not applied: boxes are relative to the pixels as they are stored.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
    if image is None:
        raise ValueError(f"cannot decode the image ({len(encoded)} bytes)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def encoded_size(encoded: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image as `decode_image` gives it, from its header alone.

    Raises:
        ValueError: the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the header of the image ({error})") from None


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after scaling the short side to `short_side`, the long one to at most
    `long_side` pixels."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(
    image: np.ndarray, boxes: np.ndarray, short_side: int, long_side: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Scales an image and its boxes, keeping the aspect ratio up to whole pixels.

    Args:
        image: uint8[H, W, 3].
        boxes: f32[N, 4], x0, y0, x1, y1 in pixels.
        short_side: length of the short side afterwards, in pixels ...
        long_side: ... unless the long side would be longer than this.

    Returns:
        uint8[h, w, 3], f32[N, 4] in the new pixels, and the factors (w / W, h / H), which differ
        by the rounding to whole pixels.
    """
    old_height, old_width = image.shape[:2]
    height, width = resized_size(old_height, old_width, short_side, long_side)
    if (height, width) != (old_height, old_width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    scale = (width / old_width, height / old_height)
    return image, boxes * np.array(scale + scale, np.float32), scale


def flip_horizontal(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirrors an image (uint8[H, W, 3]) and its boxes (f32[N, 4], x0, y0, x1, y1) left to right."""
    width = image.shape[1]
    flipped = boxes.copy()
    flipped[:, 0], flipped[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    # A view that runs backwards would be copied later on, ten times as slowly.
    return cv2.flip(image, 1), flipped

"""Encoded images, and sizes: pure functions of bytes and numbers."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}
"""How a complete JPEG or PNG ends, by how it begins."""


def decode_image(encoded: bytes) -> np.ndarray:
    """uint8[H, W, 3] RGB of an encoded image of any kind that OpenCV or Pillow reads.

    Grey images get three equal channels, of 16 bits the upper 8 are kept, palettes are looked up,
    CMYK is converted without a colour profile, alpha is left out (what it hides shows). Orientation
    tags are not applied: boxes are relative to the pixels as they are stored.

    Raises:
        ValueError: the bytes are no image, or only the beginning of one.
    """
    image = None
    if _is_complete(encoded):
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        except cv2.error:  # too large for it
            image = None
    if image is not None:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            return np.array(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"cannot decode the image ({len(encoded)} bytes)") from None


def _is_complete(encoded: bytes) -> bool:
    """False: perhaps cut off. OpenCV gives the missing rows of a JPEG in grey and says nothing;
    Pillow, which is slower, raises, and goes on where something harmless follows the image."""
    for begin, end in _ENDS.items():
        if encoded.startswith(begin):
            return encoded.endswith(end)
    return bool(encoded)


def encoded_size(image: bytes | Path) -> tuple[int, int]:
    """(height, width) of an encoded image, or of a file, as `decode_image` gives it.

    Only the header is looked at, and of a file only that is read.

    Raises:
        ValueError: there is no image.
    """
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
            return opened.height, opened.width
    except UnidentifiedImageError:  # its message names the object that was read from
        raise ValueError("is no image of a known kind") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the header of the image ({error})") from None


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after scaling the short side to `short_side`, the long one to at most
    `long_side` pixels."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))

"""Decoding of images and computation of sizes: pure functions of bytes and numbers."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}
"""{first bytes of a JPEG or PNG: last bytes of a complete one}"""


def decode_image(encoded: bytes) -> np.ndarray:
    """uint8[H, W, 3] RGB of an encoded image in any format that OpenCV or Pillow reads.

    Grey images get three equal channels, of 16 bits the upper 8 are kept, palettes are looked up,
    CMYK is converted without a colour profile, alpha is dropped (transparent pixels show their
    colour). Orientation tags are not applied: boxes are relative to the pixels as stored.

    Raises:
        ValueError: the bytes are not an image, or a truncated one.
    """
    image = None
    if _is_complete(encoded):
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        except cv2.error:  # too large for OpenCV
            image = None
    if image is not None:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            return np.array(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"cannot decode the image ({len(encoded)} bytes)") from None


def _is_complete(encoded: bytes) -> bool:
    """False if the bytes may be truncated. OpenCV silently fills the missing rows of a JPEG with
    grey; Pillow, which is slower, raises, and accepts harmless bytes after the image."""
    for begin, end in _ENDS.items():
        if encoded.startswith(begin):
            return encoded.endswith(end)
    return bool(encoded)


def encoded_size(image: bytes | Path) -> tuple[int, int]:
    """(height, width) of an encoded image, or of a file, as `decode_image` gives them.

    Only the header is read.

    Raises:
        ValueError: it is not an image.
    """
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
            return opened.height, opened.width
    except UnidentifiedImageError:  # its message names the Python object that was read
        raise ValueError("is not an image of a known format") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the header of the image ({error})") from None


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after scaling so that the short side has `short_side` pixels, unless the long
    one would then exceed `long_side`, which it gets instead."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))

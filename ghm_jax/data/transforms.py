"""Decoding of images and computation of sizes: pure functions of bytes and numbers."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from ghm_jax.data.jpeg import check_jpeg

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".qoi", ".sgi"),
)
"""Endings, in lower case, of the names of files that `decode_image` reads."""

_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
"""Pillow's modes that its conversion to RGB treats by the rule of `decode_image`."""
_ORIENTATION = 0x0112
_TO_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""{orientation tag: from the image as shown to its pixels as stored}"""
_PNM = re.compile(rb"P[2356](?:\s|#[^\n]*\n)+(?:\d+(?:\s|#[^\n]*\n)+){2}(\d+)\s")
"""Header of a PGM or PPM; its group is the value of white."""

_JPEG2000 = re.compile(rb"\xff\x4f\xff\x51.{36}(..)", re.DOTALL)
"""Begin of its codestream; the group is the number of components, and the bits of each follow."""


def decode_image(encoded: bytes) -> np.ndarray:
    """uint8[H, W, 3] RGB of an encoded image in any format that OpenCV or Pillow reads.

    Grey images get three equal channels, of 16 bits the upper 8 are kept, palettes are looked up,
    CMYK is converted without a colour profile, alpha is dropped (transparent pixels show their
    colour). Of several frames or pages the first is taken, bytes after the image are ignored.
    Orientation tags are not applied: boxes are relative to the pixels as stored.

    Raises:
        ValueError: the bytes are not an image, a truncated one, or one that the rule does not
            cover: 32 bits, signed or real numbers, CIELAB.
    """
    try:
        return _decode(encoded)
    except ValueError as error:
        raise ValueError(f"cannot decode the image ({len(encoded)} bytes): {error}") from None


def encoded_size(image: bytes | Path) -> tuple[int, int]:
    """(height, width) of an encoded image, or of a file, as `decode_image` gives them.

    Only the header is read.

    Raises:
        ValueError: it is not an image.
    """
    with _opened(image) as opened:
        return _stored_size(opened)


def is_turned(image: bytes | Path) -> bool:
    """Whether an orientation tag says to show an encoded image, or a file, other than as stored.

    Raises:
        ValueError: it is not an image, or its tags cannot be read.
    """
    with _opened(image) as opened:
        return opened.getexif().get(_ORIENTATION) in _TO_STORED


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after scaling so that the short side has `short_side` pixels, unless the long
    one would then exceed `long_side`, which it gets instead."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _decode(encoded: bytes) -> np.ndarray:
    if encoded.startswith(b"\xff\xd8"):
        image = _by_opencv(encoded)
        check_jpeg(encoded, image)
        if encoded_size(encoded) != image.shape[:2]:  # raises as well where Pillow sees no image
            raise ValueError("its header is damaged")
        return image
    if (
        encoded.startswith(b"\x89PNG")  # of which Pillow does not check all checksums
        or _is_still_webp(encoded)
        or _is_deep_pnm(encoded)
        or _is_deep_jpeg2000(encoded)
    ):
        return _by_opencv(encoded)
    # Pillow has the more complete rules of alpha and palettes; of 16 bits in TIFF OpenCV rounds.
    with _opened(encoded) as opened:
        return _by_pillow(opened)


def _is_deep_pnm(encoded: bytes) -> bool:
    """Whether it has 16 bits, of which Pillow rounds."""
    found = _PNM.match(encoded)
    white = int(found[1]) if found else 255
    if white > 255 and white != 65535:
        raise ValueError(f"its values reach to {white}, not to 255 or 65535")
    return white == 65535


def _is_deep_jpeg2000(encoded: bytes) -> bool:
    """Whether it has 16 bits, of which Pillow rounds, and then takes 256 for 0."""
    if not (encoded[4:8] == b"jP  " or encoded.startswith(b"\xff\x4f\xff\x51")):
        return False
    if not (found := _JPEG2000.search(encoded)):
        return False
    count = int.from_bytes(found[1], "big")
    samples = set(encoded[found.end() : found.end() + 3 * count : 3])  # bits - 1; from 128: signed
    if samples != {15} and max(samples, default=0) > 7:
        raise ValueError("its samples are signed, or of other than up to 8 bits or 16")
    return samples == {15}


def _is_still_webp(encoded: bytes) -> bool:
    animated = encoded[12:16] == b"VP8X" and encoded[20:21] and encoded[20] & 2
    return encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" and not animated


def _by_opencv(encoded: bytes) -> np.ndarray:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # too large for OpenCV
        image = None
    if image is None:
        raise ValueError("it is truncated or damaged")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _by_pillow(opened: Image.Image) -> np.ndarray:
    """Decodes an image of which only the header is read."""
    size, turned, bits, white_is_zero = _stored_size(opened), None, 16, False
    if isinstance(opened, TiffImageFile):
        turned = opened.getexif().get(_ORIENTATION)
        bits, white_is_zero = _check_tiff(opened)
    if opened.format == "EPS":
        raise ValueError("EPS holds a drawing, not pixels")  # Pillow would start a program
    wide = opened.format == "TIFF" and opened.mode.startswith("I;16")
    if not (wide or opened.mode in _EIGHT_BITS):
        raise ValueError(f"unsupported sample type (Pillow's mode {opened.mode})")
    image = opened
    if turned in _TO_STORED:  # Pillow applies the tag of a TIFF when it decodes
        image.load()
        image = image.transpose(_TO_STORED[turned])
    if wide:
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        array = np.repeat((255 - grey if white_is_zero else grey)[..., None], 3, axis=2)
    else:
        if image.mode == "P":
            image = image.convert("RGBA")  # or else Pillow warns of transparent colours
        array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if array.shape[:2] != size:
        raise ValueError(f"it has not the size in its header, {size[1]}x{size[0]} pixels")
    return array


def _check_tiff(opened: TiffImageFile) -> tuple[int, bool]:
    """Bits of a sample, and whether 0 is white; refuses what Pillow reads wrongly."""
    tags = opened.tag_v2
    bits = max(tags.get(258, (1,)))
    if any(kind != 1 for kind in tags.get(339, (1,))):
        raise ValueError("its samples are signed or real numbers")
    white_is_zero = tags.get(262) == 0
    apart = tags.get(284) == 2 and tags.get(259, 1) == 1
    if apart and (bits != 8 or white_is_zero):
        raise ValueError("its channels are stored apart, uncompressed, in another form than 8 bits")
    return bits, white_is_zero


def _stored_size(opened: Image.Image) -> tuple[int, int]:
    """(height, width), without an orientation tag, which Pillow applies to TIFF."""
    if isinstance(opened, TiffImageFile):
        return opened.tag_v2[257], opened.tag_v2[256]
    return opened.height, opened.width


@contextlib.contextmanager
def _opened(image: bytes | Path) -> Iterator[Image.Image]:
    """An image whose header is read, by Pillow.

    Raises:
        ValueError: it is not an image, or what is done with it fails.
    """
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
            yield opened
    except UnidentifiedImageError:  # its message names the Python object that was read
        raise ValueError("is not an image of a known format") from None
    except Exception as error:  # for damaged files Pillow raises errors of every type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason) from None

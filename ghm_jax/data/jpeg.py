"""Whether all of a JPEG is there, which its decoder does not tell.

OpenCV decodes what it finds: blocks without data become mid-grey, and an image whose later scans
are missing is blurred. It only warns, on the standard error of the process.
"""

import io
import re
from collections.abc import Iterator

import cv2
import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

END = b"\xff\xd9"
"""The end marker."""

_SEQUENTIAL = {0xC0, 0xC1, 0xC3, 0xC5, 0xC7, 0xC9, 0xCB, 0xCD, 0xCF}  # these list the components
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}  # and these
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)  # except those inside of a scan
_MID_GREY = ([128] * 3, [64] * 3, [65] * 3)
"""Pixels of a block without data: of an RGB or grey image, and of the two kinds of CMYK."""
_NOISE = np.random.default_rng(0).integers(0, 255, 64, np.uint8).tobytes()  # no 255: no marker
_MORE_DATA = b"\0" + _NOISE + b"".join(b"\xff" + bytes([0xD0 + i]) + _NOISE for i in range(8))
"""Data of blocks, also for a decoder that waits for one of the eight restart markers. Zero first,
because a JPEG may have been cut off after 255, with which another byte would be a marker."""


def check_jpeg(encoded: bytes, image: np.ndarray) -> None:
    """Checks that a JPEG was decoded from all of its data.

    Found are an end that is missing or comes too early, and scans that are missing. Not found is
    damage that leaves as much data as there are blocks, or more: their colours are wrong.

    Nearly every image costs only a look at its header and its last pixel. Where that pixel is
    mid-grey, data is appended and the image decoded again: it changes if blocks were missing.

    Args:
        encoded: the file; bytes after its end marker are ignored.
        image: uint8[H, W, 3], RGB, what was decoded.

    Raises:
        ValueError: something is missing.
    """
    ends_grey = image[-1, -1].tolist() in _MID_GREY
    try:
        if not ends_grey and encoded.endswith(END) and _has_one_scan(encoded):
            return
        end = _end(encoded)
    except LookupError:
        raise ValueError("one of its segments is too short") from None
    if ends_grey and _differ(image, _decode_quietly(encoded[:end] + _MORE_DATA + END)):
        raise ValueError("it is truncated")


def _decode_quietly(encoded: bytes) -> np.ndarray:
    """By Pillow, which does not warn of data after the last block."""
    try:
        with JpegImageFile(io.BytesIO(encoded)) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError):
        raise ValueError("it is damaged") from None


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    """By more than two decoders do."""
    return one.shape != other.shape or bool(cv2.absdiff(one, other).max() > 16)


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes, int]]:
    """The marker, the content and the place of each segment, the end marker being the last."""
    place = 2
    while found := _MARKER.search(encoded, place):
        marker, place = found[1][0], found.end()
        length = 0 if marker == _END else int.from_bytes(encoded[place : place + 2], "big")
        yield marker, encoded[place + 2 : place + length], found.start()
        if marker == _END:
            return
        place += length
    raise ValueError("it is truncated")


def _has_one_scan(encoded: bytes) -> bool:
    """Whether all components are in the first scan; reads the header only."""
    components = -1
    for marker, content, _ in _segments(encoded):
        if marker in _SEQUENTIAL:
            components = content[5]
        if marker == _SCAN:
            return content[0] == components
    return False


def _end(encoded: bytes) -> int:
    """The place of the end marker, after all scans."""
    missing: dict[int, np.ndarray] = {}  # bool[64] of each component: coefficients not yet exact
    progressive = False
    for marker, content, place in _segments(encoded):
        if marker in _SEQUENTIAL | _PROGRESSIVE:
            progressive = marker in _PROGRESSIVE
            missing = {number: np.ones(64, bool) for number in content[6 : 6 + 3 * content[5] : 3]}
        elif marker == _SCAN:
            count = content[0]
            first, last, bits = (content[1 + 2 * count + i] for i in range(3))
            for number in content[1 : 1 + 2 * count : 2]:
                # The lower half of `bits` counts those that later scans still have to add.
                scanned = slice(first, last + 1) if progressive else slice(None)
                missing[number][scanned] = progressive and bits % 16 > 0
        elif marker == _END and not any(rest.any() for rest in missing.values()):
            return place
    raise ValueError("scans are missing")

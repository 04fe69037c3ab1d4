"""Image files written byte by byte after their specifications: oracles for the decoders."""

import itertools
import struct
import zlib

import numpy as np

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of the colour types of PNG
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))


def _packed_rows(values: np.ndarray, bits: int, order: str = ">") -> list[bytes]:
    """Of int[H, W, C]; every row begins with a new byte."""
    rows = values.reshape(len(values), -1)
    if bits >= 8:
        return [row.astype(f"{order}u{bits // 8}").tobytes() for row in rows]
    digits = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(digits.reshape(len(rows), -1).astype(np.uint8), axis=1)
    return [row.tobytes() for row in packed]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(values, bits, colour_type, *, interlaced=False, chunks=(), share=1.0) -> bytes:
    """Of int[H, W, C]; `chunks` stand before the pixels, of which a share is written."""
    height, width = values.shape[:2]
    steps = (*_ADAM7, (1, 0, 2, 1)) if interlaced else ((0, 0, 1, 1),)
    parts = [values[y::dy, x::dx] for y, x, dy, dx in steps]
    rows = [row for part in parts if part.size for row in _packed_rows(part, bits)]
    pixels = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    whole = [(b"IHDR", header), *chunks]
    whole += [(b"IDAT", zlib.compress(pixels[: int(share * len(pixels))])), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(png_chunk, whole))


def tiff(values, bits, photometric, *, order="<", planes=False, deflate=False, tags=()) -> bytes:
    """Of int[H, W, C] in one strip, or one for each channel; more tags are {number: values}."""
    height, width, count = values.shape
    parts = [values[..., i : i + 1] for i in range(count)] if planes else [values]
    strips = [b"".join(_packed_rows(part, bits, order)) for part in parts]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    entries = {256: [width], 257: [height], 258: [bits] * count, 259: [8 if deflate else 1]}
    entries |= {262: [photometric], 277: [count], 278: [height], 284: [1 + planes], **dict(tags)}
    body = bytearray(b"II*\0" if order == "<" else b"MM\0*") + bytes(4)

    def place(content: bytes) -> int:
        body.extend(bytes(len(body) % 2))
        body.extend(content)
        return len(body) - len(content)

    entries |= {273: [place(strip) for strip in strips], 279: [len(strip) for strip in strips]}
    directory = struct.pack(order + "H", len(entries))
    for tag, numbers in sorted(entries.items()):
        letter, kind = ("I", 4) if tag in (256, 257, 273, 278, 279) else ("H", 3)
        content = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(content) > 4:
            content = struct.pack(order + "I", place(content))
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    start = place(directory + bytes(4))
    body[4:8] = struct.pack(order + "I", start)
    return bytes(body)


def gif(palette, frames, size, *, transparent=None) -> bytes:
    """Of uint8[256, 3] and (x, y, uint8[H, W]) frames on a canvas of (width, height)."""
    content = b"GIF89a" + struct.pack("<HHBBB", *size, 0xF7, 3, 0) + palette.tobytes()
    for x, y, indices in frames:
        flags = 8 + (transparent is not None)
        content += b"\x21\xf9\x04" + struct.pack("<BHB", flags, 10, transparent or 0) + b"\0"
        content += b"\x2c" + struct.pack("<HHHHB", x, y, *indices.shape[::-1], 0)
        content += _gif_pixels(indices.ravel().tolist())
    return content + b";"


def _gif_pixels(indices: list[int]) -> bytes:
    """LZW without repetitions: the table is emptied before codes would need a tenth bit."""
    bits, number = 0, 0
    for i, index in enumerate(indices):
        for code in (256, index) if i % 100 == 0 else (index,):
            bits, number = bits | code << 9 * number, number + 1
    bits, number = bits | 257 << 9 * number, number + 1
    packed = bits.to_bytes(-(-9 * number // 8), "little")
    blocks = [packed[i : i + 255] for i in range(0, len(packed), 255)]
    return b"\x08" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"

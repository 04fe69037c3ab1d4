"""One rule for depth, channels, alpha, frames and orientation, whichever library decodes.

The oracles are numbers that tests write into files byte by byte (image_files.py), and for lossy
formats OpenCV's own decoding.
"""

import itertools
import os
import struct
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from image_files import CHANNELS, gif, png, tiff
from PIL import Image, features
from test_images import saved

from ghm_jax.data.transforms import IMAGE_SUFFIXES, decode_image, encoded_size, is_turned

EXAMPLES = int(os.environ.get("GHM_FUZZ_EXAMPLES", "150"))


def upper_bits(values, bits):
    """What 8 bits keep of int[H, W, C]; fewer than 8 bits are stretched to 0..255."""
    return values >> bits - 8 if bits >= 8 else values * 255 // (2**bits - 1)


def assert_is(encoded, expected, what=""):
    image = decode_image(encoded)
    assert image.dtype == np.uint8
    assert image.shape[:2] == encoded_size(encoded)
    expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    np.testing.assert_array_equal(image, expected, err_msg=str(what))


def refusal(encoded) -> str:
    with pytest.raises(ValueError, match="cannot decode") as raised:
        decode_image(encoded)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("colour_type", CHANNELS)
def test_every_kind_of_png_gives_its_upper_bits_whatever_follows(rng, colour_type):
    depths = {0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(colour_type, (8, 16))
    for bits, interlaced, alpha in itertools.product(depths, (False, True), (False, True)):
        values = rng.integers(0, 2**bits, (21, 13, CHANNELS[colour_type]))
        chunks = [(b"gAMA", struct.pack(">I", 100000))]
        expected = upper_bits(values[..., : 1 if colour_type in (0, 4) else 3], bits)
        if colour_type == 3:
            palette = rng.integers(0, 256, (2**bits, 3), np.uint8)
            chunks.append((b"PLTE", palette.tobytes()))
            expected = palette[values[..., 0]]
        if alpha and colour_type in (0, 2):
            chunks.append((b"tRNS", values[3, 3].astype(">u2").tobytes()))
        if alpha and colour_type == 3:
            chunks.append((b"tRNS", rng.integers(0, 256, 2**bits, np.uint8).tobytes()))
        encoded = png(values, bits, colour_type, interlaced=interlaced, chunks=chunks)
        for after in (b"", b"\n", encoded):
            assert_is(encoded + after, expected, (bits, interlaced, alpha, after[:1]))


def test_a_png_that_is_damaged_or_short_of_pixels_is_refused(rng):
    values = rng.integers(0, 256, (40, 30, 3))
    encoded = png(values, 8, 2)
    for interlaced, share in itertools.product((False, True), (0.0, 0.5, 0.99)):
        refusal(png(values, 8, 2, interlaced=interlaced, share=share))
    for end in (4, 12, 13, len(encoded) // 2):
        refusal(encoded[:-end])
    for place in range(8, len(encoded) - 12, 97):
        refusal(encoded[:place] + bytes([encoded[place] ^ 1]) + encoded[place + 1 :])


COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}  # channels by TIFF's photometric interpretation


@pytest.mark.parametrize("photometric", COLOURS)
def test_every_kind_of_tiff_gives_its_upper_bits_or_is_refused(rng, photometric):
    accepted = set()
    layouts = itertools.product("<>", (False, True), (False, True))
    kinds = itertools.product((1, 2, 4, 8, 16, 32), ((), (0,), (2,)), (1, 2, 3), layouts)
    for bits, extra, kind, (order, planes, deflate) in kinds:
        channels = COLOURS[photometric] + len(extra)
        if photometric == 3 and (bits > 8 or extra):
            continue
        values = rng.integers(0, 2**bits, (7, 5, channels))
        tags = {339: [kind] * channels} | ({338: extra} if extra else {})
        colours = upper_bits(values, bits)
        if photometric == 3:
            palette = rng.integers(0, 2**16, (3, 2**bits))
            tags[320] = palette.ravel().tolist()
            expected = (palette.T >> 8)[values[..., 0]]
        elif photometric == 5:
            expected = np.round((255 - colours[..., :3]) * (255 - colours[..., 3:4]) / 255)
        elif photometric == 2:
            expected = colours[..., :3]
        else:
            expected = colours[..., :1] if photometric else 255 - colours[..., :1]
        encoded = tiff(
            values, bits, photometric, order=order, planes=planes, deflate=deflate, tags=tags
        )
        try:
            decode_image(encoded)
        except ValueError:
            refusal(encoded)
        else:
            assert kind == 1
            assert_is(encoded, expected, (bits, extra, kind, order, planes, deflate))
            accepted.add((bits, bool(extra), order, planes, deflate))
    common = {(8, False, order, False, deflate) for order in "<>" for deflate in (False, True)}
    if photometric in (1, 2):
        common |= {(16, *rest) for _, *rest in common}
    if photometric == 2:
        common |= {(bits, True, *rest) for bits, _, *rest in common}
    assert accepted >= common
    assert not any(bits == 32 for bits, *_ in accepted)


@pytest.mark.parametrize("tag", range(1, 9))
def test_pixels_of_a_tiff_stay_as_stored_whatever_its_orientation_tag(rng, tag):
    deep, plain = rng.integers(0, 2**16, (7, 5, 1)), rng.integers(0, 256, (7, 5, 3))
    for deflate in (False, True):
        for values, bits, photometric in ((deep, 16, 1), (plain, 8, 2)):
            encoded = tiff(values, bits, photometric, deflate=deflate, tags={274: [tag]})
            assert_is(encoded, upper_bits(values, bits))
            assert is_turned(encoded) == (tag > 1)


@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_portable_maps_of_8_and_16_bits_and_no_others(rng, kind):
    channels = 3 if kind in ("P3", "P6") else 1
    for white in (255, 65535, 300, 4095):
        values = rng.integers(0, white + 1, (9, 7, channels))
        pixels = values.astype(">u2" if white > 255 else np.uint8).tobytes()
        if kind in ("P2", "P3"):
            pixels = " ".join(map(str, values.ravel())).encode() + b"\n"
        encoded = f"{kind}\n# a comment 9\n7 9\n{white}\n".encode() + pixels
        if white in (255, 65535):
            assert_is(encoded, values if white == 255 else values >> 8)
            refusal(encoded[: len(encoded) // 2])
        else:
            assert f"reach to {white}" in refusal(encoded)


def test_jpeg2000_of_16_bits_keeps_the_upper_eight(rng):
    lossless = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    for channels in (1, 3, 4):
        values = rng.integers(0, 2**16, (64, 80, channels)).astype(np.uint16)
        values[:9] |= 0xFF00  # the largest ones, which rounding would carry over
        encoded = cv2.imencode(".jp2", values, lossless)[1].tobytes()
        place = encoded.index(b"\xff\x4f\xff\x51") + 42
        assert encoded[place] == 15
        assert_is(encoded, values[..., : min(channels, 3)][..., ::-1] >> 8)
        for bits_less_one in (11, 128 + 15):
            other = bytes([bits_less_one, 1, 1]) * channels
            assert "bits" in refusal(encoded[:place] + other + encoded[place + 3 * channels :])


def test_sgi_of_16_bits_keeps_the_upper_eight(rng):
    for channels in (1, 3):
        values = rng.integers(0, 2**16, (9, 7, channels))
        header = struct.pack(
            ">hBBHHHH", 474, 0, 2, 2 + (channels > 1), 7, 9, channels
        ) + struct.pack(">ii", 0, 65535)
        planes = values[::-1].transpose(2, 0, 1).astype(">u2").tobytes()  # from the bottom up
        assert_is(header.ljust(512, b"\0") + planes, values >> 8)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "SPIDER"])
def test_real_numbers_are_refused(rng, kind):
    image = Image.fromarray(rng.random((20, 30)).astype(np.float32))
    why = "real numbers" if kind == "TIFF" else "mode F"
    assert why in refusal(saved(image, kind))


@pytest.mark.parametrize("transparent", [None, 0, 7])
def test_of_a_gif_the_first_frame_is_taken_and_transparent_pixels_show_their_colour(
    rng, transparent
):
    palette = rng.integers(0, 256, (256, 3), np.uint8)
    whole, other = rng.integers(0, 256, (2, 10, 20), np.uint8)
    whole[2:4, 3:9] = 7
    frames = [(0, 0, whole), (0, 0, other)]
    for count in (1, 2):
        encoded = gif(palette, frames[:count], (20, 10), transparent=transparent)
        assert_is(encoded, palette[whole])
    small = np.full((10, 20), transparent or 0)
    small[2:8, 3:11] = other[:6, :8]
    assert_is(
        gif(palette, [(3, 2, other[:6, :8])], (20, 10), transparent=transparent), palette[small]
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_of_several_frames_or_pages_the_first_is_taken(rng, kind):
    frames = [Image.fromarray(rng.integers(0, 256, (20, 30), np.uint8)) for _ in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_is(
        saved(frames[0], kind, save_all=True, append_images=frames[1:], **options),
        np.asarray(frames[0])[..., None],
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000", "TGA", "QOI"])
def test_alpha_is_dropped_and_hidden_colours_are_seen(rng, kind):
    pixels = rng.integers(0, 256, (20, 30, 4), np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert_is(saved(Image.fromarray(pixels), kind, **options), pixels[..., :3])


ORDINARY = [
    *[("JPEG", {"subsampling": s, "progressive": p}) for s in (0, 1, 2) for p in (False, True)],
    *[("JPEG", {"restart_marker_blocks": 3}), ("PNG", {}), ("WEBP", {"quality": 70})],
    *[("WEBP", {"lossless": True}), ("BMP", {}), ("GIF", {}), ("PPM", {}), ("JPEG2000", {})],
    *[("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"})],
]


@pytest.mark.parametrize(("kind", "options"), ORDINARY)
def test_ordinary_images_are_what_opencv_decodes(rng, kind, options):
    for size in ((33, 47), (8, 16), (1, 1), (64, 3)):
        coarse = rng.integers(0, 256, (-(-size[0] // 4), -(-size[1] // 4), 3), np.uint8)
        image = Image.fromarray(cv2.resize(coarse, size[::-1]))
        for encoded in (saved(image, kind, **options), saved(image.convert("L"), kind, **options)):
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            expected = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
            if expected is None:
                pytest.skip(f"this OpenCV does not decode {kind}")
            assert_is(encoded, expected[..., ::-1])


def photo(rng) -> Image.Image:
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    smooth = cv2.resize(coarse, (96, 80), interpolation=cv2.INTER_CUBIC) + rng.normal(
        0, 8, (80, 96, 3)
    )
    return Image.fromarray(smooth.clip(0, 255).astype(np.uint8))


JPEGS = [
    *[("RGB", {"quality": 90, "subsampling": s, "progressive": p}) for s in (0, 2) for p in (0, 1)],
    *[("L", {"quality": 90}), ("CMYK", {"quality": 90}), ("RGB", {"restart_marker_blocks": 1})],
]


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_a_jpeg_that_was_cut_off_and_closed_is_refused(rng, mode, options):
    """Unless no more than the last block, or the last bit of coefficients, is missing. Colours of
    a block reach two pixels over its edge."""
    encoded = saved(photo(rng).convert(mode), "JPEG", **options)
    whole, start = decode_image(encoded).astype(int), encoded.index(b"\xff\xda") + 14
    other = saved(photo(rng), "JPEG")
    refused = 0
    for place in rng.integers(start, len(encoded) - 2, 40):
        for end in (b"\xff\xd9", b"\xff\xd9\n", b"\xff\xd9" + other):
            try:
                image = decode_image(encoded[:place] + end)
            except ValueError:
                refused += 1
                continue
            away = np.abs(image - whole)
            if options.get("progressive"):
                assert away.mean() < 4
            else:
                assert not away[:-18].any()
                assert not away[:, :-18].any()
        refusal(encoded[:place])
    assert refused > 100 or options.get("progressive")


def test_a_jpeg_whose_data_was_overwritten_by_a_marker_is_refused(rng):
    encoded = saved(photo(rng), "JPEG", quality=90)
    for place in rng.integers(encoded.index(b"\xff\xda") + 14, len(encoded) - 400, 20):
        refusal(encoded[:place] + b"\xff\xd9" + encoded[place + 2 :])


QUIET = """
import sys
from ghm_jax.data.transforms import decode_image
decode_image(sys.stdin.buffer.read())
"""


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_ends_in_grey_is_decoded_without_a_word(rng, mode):
    pixels = np.array(photo(rng))
    pixels[40:] = 128
    image = Image.fromarray(pixels).convert("L" if mode == "L" else "RGB")
    if mode == "CMYK":
        image = Image.fromarray(np.dstack([pixels, np.full((80, 96), 128, np.uint8)]), "CMYK")
    encoded = saved(image, "JPEG", quality=95)
    flat = decode_image(encoded)[60:]
    assert np.ptp(flat) == 0
    command = [sys.executable, "-c", QUIET]
    done = subprocess.run(command, input=encoded, capture_output=True, check=True)
    assert done.stderr == b""
    refusal(encoded[: len(encoded) // 3] + b"\xff\xd9")


def test_bytes_after_a_jpeg_change_nothing(rng):
    encoded = saved(photo(rng), "JPEG")
    expected = decode_image(encoded)
    for after in (b"\0", b"\n", b"\xff", b"\xff\xd9", encoded, bytes(1000)):
        assert_is(encoded + after, expected)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_files_of_every_ending_are_decoded(rng, tmp_path, suffix):
    if suffix.startswith(".avif") and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    path, image = tmp_path / f"a{suffix}", photo(rng)
    if suffix in (".pgm", ".pbm"):
        image = image.convert("L" if suffix == ".pgm" else "1")
    image.save(path)
    found = decode_image(path.read_bytes())
    assert found.shape[:2] == encoded_size(path) == (80, 96)
    assert np.abs(found - np.asarray(image.convert("RGB")).astype(int)).mean() < 16


def good_files() -> dict[str, bytes]:
    image = photo(np.random.default_rng(0))
    jpegs = {
        f"jpeg {mode} {options}": saved(image.convert(mode), "JPEG", **options)
        for mode, options in JPEGS
    }
    kinds = ["WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "TGA", "PCX", "QOI", "SGI"]
    kinds += ["AVIF"] if features.check("avif") else []
    packed = {"packed tiff": saved(image, "TIFF", compression="tiff_adobe_deflate")}
    return jpegs | {kind: saved(image, kind) for kind in kinds} | packed


FILES = good_files()
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "overwrite", "remove", "insert", "repeat"]),
        st.floats(0, 1),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def check_one_line(error: ValueError) -> None:
    assert "\n" not in str(error)


def changed(encoded: bytes, changes) -> bytes:
    for what, where, length, other in changes:
        # Squared, because headers are what most can go wrong in.
        place = int(where**2 * len(encoded))
        before, here, after = encoded[:place], encoded[place:], encoded[place + length :]
        encoded = {
            "cut": before,
            "overwrite": before + other + encoded[place + len(other) :],
            "remove": before + after,
            "insert": before + other + here,
            "repeat": before + here[:length] + here,
        }[what]
    return encoded


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(FILES)), changes=CHANGES)
def test_a_damaged_file_is_an_image_of_its_size_or_one_line(name, changes):
    encoded = changed(FILES[name], changes)
    try:
        height, width = encoded_size(encoded)
    except ValueError as error:
        check_one_line(error)
        height, width = 0, 0
    assume(height * width < 1e6)
    try:
        image = decode_image(encoded)
    except ValueError as error:
        check_one_line(error)
        return
    assert image.dtype == np.uint8
    assert image.shape == (height, width, 3)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES, bits=st.sampled_from([8, 16]), seed=st.integers(0, 9))
def test_a_damaged_png_is_the_same_image_or_one_line(changes, bits, seed):
    """Checksums cover everything; what may change is what does not matter."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (12, 9, 3))
    encoded = changed(png(values, bits, 2, chunks=[(b"tEXt", b"Title\0a")]), changes)
    try:
        image = decode_image(encoded)
    except ValueError as error:
        check_one_line(error)
    else:
        np.testing.assert_array_equal(image, upper_bits(values, bits))


@pytest.mark.parametrize("name", FILES)
def test_a_part_of_a_file_is_refused(name):
    for share in (0.3, 0.5, 0.8, 0.95):
        refusal(FILES[name][: int(share * len(FILES[name]))])


def test_a_jpeg_whose_size_only_one_library_reads_is_refused():
    """OpenCV decodes it without the bytes that Pillow needs."""
    encoded = changed(FILES["jpeg L {'quality': 90}"], [("remove", 0.0390625, 9, b"\0")])
    with pytest.raises(ValueError, match="not an image"):
        encoded_size(encoded)
    refusal(encoded)

"""Images and boxes are changed together; the oracle places marks and counts pixels in float64."""

import cv2
import numpy as np
import pytest

from ghm_jax.batch import NO_CLASS
from ghm_jax.config import Data
from ghm_jax.data.batching import choose_bucket, collate, filler_example, make_example
from ghm_jax.data.placement import Placement, choose_placement, to_original
from ghm_jax.data.transforms import decode_image, encoded_size
from ghm_jax.exceptions import ConfigError, DataError


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    bgr = image if image.ndim == 2 else image[:, :, ::-1]
    return cv2.imencode(suffix, bgr)[1].tobytes()


def marked(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = 255
    return image


def record(image: np.ndarray, boxes: list, crowd: list | None = None, image_id: int = 7) -> dict:
    """As TFDS gives it: boxes ymin, xmin, ymax, xmax in [0, 1], lists."""
    height, width = image.shape[:2]
    relative = [
        np.array([y0 / height, x0 / width, y1 / height, x1 / width], np.float32)
        for x0, y0, x1, y1 in boxes
    ]
    return {
        "image": encode(image),
        "image/filename": b"a.png",
        "image/id": np.int64(image_id),
        "objects": {
            "bbox": relative,
            "label": [np.int64(i) for i in range(len(boxes))],
            "is_crowd": crowd or [False] * len(boxes),
            "area": [np.int64(1)] * len(boxes),
            "id": [np.int64(i + 1) for i in range(len(boxes))],
        },
    }


def data(**changes) -> Data:
    settings = {"short_side": 64, "long_side": 96, "buckets": ((64, 96), (96, 64), (96, 96))}
    return Data(**{**settings, "max_boxes": 4, "flip": 0.0, **changes})


def test_decoded_channels_are_red_green_blue():
    image = np.zeros((5, 4, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = 200, 100
    np.testing.assert_array_equal(decode_image(encode(image)), image)


def test_grey_images_get_three_equal_channels(rng):
    grey = rng.integers(0, 256, (5, 4), np.uint8)
    np.testing.assert_array_equal(decode_image(encode(grey)), np.repeat(grey[:, :, None], 3, 2))


def test_the_size_in_the_header_is_the_decoded_size_whatever_the_orientation_tag(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show"
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    encoded = (tmp_path / "turned.jpg").read_bytes()
    assert encoded_size(encoded) == decode_image(encoded).shape[:2] == (20, 40)


@pytest.mark.parametrize("encoded", [b"", b"no image"])
def test_bytes_that_are_not_an_image_raise(encoded):
    with pytest.raises(ValueError, match="cannot decode"):
        decode_image(encoded)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((100, 1000), (133, 1333)),
        ((1, 5000), (1, 1333)),
        ((800, 800), (800, 800)),
    ],
)
def test_resize_keeps_the_aspect_ratio_within_both_limits(size, expected):
    placement = choose_placement(size, data(short_side=800, long_side=1333), None)
    assert placement.place_image(np.zeros((*size, 3), np.uint8)).shape[:2] == expected
    assert placement.scale == (expected[1] / size[1], expected[0] / size[0])


def test_boxes_scale_with_the_pixels_they_mark(rng):
    for _ in range(20):
        height, width = rng.integers(40, 200, 2)
        x0, y0 = rng.integers(0, width - 20), rng.integers(0, height - 20)
        box = (int(x0), int(y0), int(x0 + rng.integers(10, 20)), int(y0 + rng.integers(10, 20)))
        sides = data(short_side=100, long_side=160)
        placement = choose_placement((int(height), int(width)), sides, None)
        image = placement.place_image(marked(height, width, box))
        boxes = placement.place_boxes(np.array([box], np.float32))
        # The marked area under the linear filter: its edges are where brightness passes one half.
        new_height, new_width = image.shape[:2]
        factor = np.array([new_width / width, new_height / height] * 2, np.float64)
        np.testing.assert_allclose(boxes[0], np.float64(box) * factor, rtol=1e-6)
        rows, columns = (np.flatnonzero((image[:, :, 0] > 127).any(a)) for a in (1, 0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(boxes[0], seen, atol=1)


def test_marked_pixels_stay_in_their_box_after_resize_and_flip(rng):
    box = (30, 11, 57, 40)
    example = make_example(record(marked(90, 120, box), [box]), data(flip=1.0), rng)
    rows, columns = (np.flatnonzero((example.image[:, :, 0] > 127).any(a)) for a in (1, 0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(example.boxes[0], seen, atol=1)
    assert example.boxes[0, 0] == pytest.approx((120 - 57) * 64 / 90, rel=1e-2)


def test_flipping_twice_changes_nothing(rng):
    image = rng.integers(0, 256, (7, 10, 3), np.uint8)
    boxes = np.array([[1, 2, 4, 6], [0, 0, 10, 7]], np.float32)
    mirror = Placement((7, 10), (7, 10), (0, 0), (7, 10), mirrored=True)
    once = mirror.place_boxes(boxes)
    np.testing.assert_array_equal(once, [[6, 2, 9, 6], [0, 0, 10, 7]])
    np.testing.assert_array_equal(mirror.place_boxes(once), boxes)
    twice = mirror.place_image(mirror.place_image(image))
    np.testing.assert_array_equal(twice, image)


def test_marked_pixels_stay_in_their_box_whatever_the_augmentation(rng):
    """Zoom, crop and flip: the remaining box fits what remains of the mark."""
    settings = data(flip=0.5, min_short_side=32, zoom=(0.4, 2.0))
    seen = set()
    for _ in range(60):
        height, width = rng.integers(60, 200, 2)
        x0, y0 = rng.integers(0, width - 40), rng.integers(0, height - 40)
        box = (int(x0), int(y0), int(x0 + rng.integers(25, 40)), int(y0 + rng.integers(25, 40)))
        example = make_example(record(marked(height, width, box), [box]), settings, rng)
        frame_height, frame_width = example.image.shape[:2]
        assert min(frame_height, frame_width) <= 64
        assert max(frame_height, frame_width) <= 96
        bright = example.image[:, :, 0] > 127
        if len(example.boxes) and np.ptp(example.boxes.reshape(2, 2), axis=0).min() > 3:
            rows, columns = (np.flatnonzero(bright.any(a)) for a in (1, 0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(example.boxes[0], found, atol=1.6)
            back = to_original(example.boxes, np.array(example.scale), np.array(example.offset))
            assert (back[0] >= np.array(box)[[0, 1, 0, 1]] - 1e-3).all()
            assert (back[0] <= np.array(box)[[2, 3, 2, 3]] + 1e-3).all()
            whole = np.abs(back[0] - box).max() < 1e-3
            seen.add((bool(example.scale[0] < 0), bool(whole)))
        elif not len(example.boxes):
            assert not bright.any()
    assert len(seen) == 4  # mirrored or not, cropped or not


def test_drawn_sides_and_zooms_fill_their_ranges():
    rng = np.random.default_rng(0)
    drawn = [choose_placement((60, 90), data(min_short_side=32), rng).size[0] for _ in range(800)]
    assert (min(drawn), max(drawn), len(set(drawn))) == (32, 64, 33)
    zoomed = [choose_placement((60, 90), data(zoom=(0.5, 2.0)), rng) for _ in range(400)]
    assert all(p.size[0] <= 64 and p.size[1] <= 96 for p in zoomed)
    assert min(p.scaled[0] for p in zoomed) < 36
    assert max(p.scaled[0] for p in zoomed) > 122
    assert len({p.corner for p in zoomed}) > 100


def test_crowd_regions_and_degenerate_boxes_are_not_learned():
    boxes = [(0, 0, 8, 8), (2, 2, 30, 30), (5, 5, 5, 9), (5, 5, 9, 5), (1, 1, 4, 4)]
    crowd = [False, True, False, False, False]
    example = make_example(record(marked(64, 64, boxes[0]), boxes, crowd), data(), None)
    np.testing.assert_array_equal(example.labels, [0, 4])
    np.testing.assert_allclose(example.boxes, [boxes[0], boxes[4]], atol=1e-4)


def test_crowd_regions_are_kept_on_request_and_marked():
    boxes = [(0, 0, 8, 8), (2, 2, 30, 30), (5, 5, 5, 9)]
    crowd = [False, True, True]
    whole = record(marked(64, 64, boxes[0]), boxes, crowd)
    example = make_example(whole, data(), None, keep_crowd=True)
    np.testing.assert_array_equal(example.labels, [0, NO_CLASS])
    np.testing.assert_array_equal(example.is_crowd, [False, True])
    np.testing.assert_allclose(example.boxes, boxes[:2], atol=1e-4)
    assert example.labels.dtype == np.int32


def test_crowds_are_dropped_first_if_there_are_too_many_boxes():
    boxes = [(0, 0, s, s) for s in (5, 60, 9, 20, 7, 12)]
    crowd = [s > 15 for _, _, s, _ in boxes]
    example = make_example(
        record(marked(64, 64, boxes[0]), boxes, crowd), data(), None, keep_crowd=True
    )
    truth = collate([example], (64, 96), 4).batch.truth
    np.testing.assert_array_equal(truth.labels, [[0, 2, 4, 5]])
    assert not truth.is_crowd.any()
    truth = collate([example], (64, 96), 5).batch.truth
    np.testing.assert_array_equal(truth.labels, [[0, NO_CLASS, 2, 4, 5]])
    np.testing.assert_array_equal(truth.is_crowd, [[False, True, False, False, False]])


def test_an_undecodable_image_is_named():
    broken = {**record(marked(8, 8, (0, 0, 4, 4)), []), "image": b"broken"}
    with pytest.raises(DataError, match=r"image 7 \(a.png\): cannot decode"):
        make_example(broken, data(), None)


def test_collate_pads_bottom_and_right_with_zeros(rng):
    wide = rng.integers(1, 256, (40, 80, 3), np.uint8)
    examples = [make_example(record(wide, [(8, 4, 20, 30)]), data(), None), filler_example()]
    loaded = collate(examples, (64, 96), 4)
    batch, truth = loaded.batch, loaded.batch.truth
    assert batch.images.shape == (2, 64, 96, 3)
    h, w = batch.image_size[0]
    assert (h, w) == (48, 96)  # the long side is the limit
    assert batch.images[0, :h, :w].min() > 0
    assert batch.images[0, h:].max() == 0
    np.testing.assert_array_equal(truth.labels, [[0, -1, -1, -1], [-1] * 4])
    np.testing.assert_allclose(truth.boxes[0, 0], np.array([8, 4, 20, 30]) * 1.2, rtol=1e-5)
    assert not truth.boxes[0, 1:].any()
    assert not truth.is_crowd.any()
    np.testing.assert_array_equal(loaded.valid, [True, False])
    np.testing.assert_array_equal(batch.image_id, [7, -1])
    np.testing.assert_allclose(loaded.scale[0], [1.2, 1.2])
    np.testing.assert_array_equal(loaded.offset[0], [0, 0])
    dtypes = {name: array.dtype.name for name, array in loaded._asdict().items() if name != "batch"}
    assert dtypes == {
        **{"scale": "float32", "offset": "float32", "dropped_boxes": "int32"},
        **{"valid": "bool", "replaced": "bool"},
    }
    assert [array.dtype.name for array in batch[:3]] == ["uint8", "int32", "int32"]
    assert [array.dtype.name for array in truth] == ["float32", "int32", "bool"]


def test_the_largest_boxes_are_kept_and_the_dropped_ones_counted():
    boxes = [(0, 0, s, s) for s in (5, 30, 9, 20, 7, 12)]
    example = make_example(record(marked(64, 64, boxes[0]), boxes), data(), None)
    loaded = collate([example], (64, 96), 4)
    np.testing.assert_array_equal(loaded.batch.truth.labels, [[1, 2, 3, 5]])
    np.testing.assert_array_equal(loaded.dropped_boxes, [2])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 20), (64, 96)), ((64, 96), (64, 96)), ((96, 60), (96, 64)), ((65, 65), (96, 96))],
)
def test_an_image_goes_into_the_first_bucket_that_it_fits(size, expected):
    assert choose_bucket(size, data().buckets) == expected


def test_an_image_that_fits_in_no_bucket_is_an_error_with_its_size():
    with pytest.raises(ConfigError, match=r"data.buckets: .* 97x20 pixels .*add a larger one"):
        choose_bucket((97, 20), data().buckets)

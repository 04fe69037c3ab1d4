"""Images of every kind become 8-bit RGB; the oracle is what was drawn, in Pillow's own formats."""

import functools
import io
import itertools
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from ghm_jax.config import Anchors, Config, Data, Optimizer, Run
from ghm_jax.data import Dataset, train_batches, validation_batches
from ghm_jax.data.summary import ReplacementLog, input_notes
from ghm_jax.data.transforms import decode_image, encoded_size
from ghm_jax.exceptions import ConfigError, DataError


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def blocks() -> np.ndarray:
    """uint8[32, 48, 3]: flat enough for a JPEG to keep."""
    colours = np.array([[[220, 40, 30], [20, 200, 60], [10, 30, 240]]], np.uint8)
    return colours.repeat(32, 0).repeat(16, 1)


def kinds():
    rgb = Image.fromarray(blocks())
    sixteen = (blocks().astype(np.uint16) << 8) + 99
    hidden = Image.fromarray(np.dstack([blocks(), np.zeros((32, 48), np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show"
    yield "rgb.jpg", saved(rgb, "JPEG", quality=95, subsampling=0), 8
    yield "cmyk.jpg", saved(rgb.convert("CMYK"), "JPEG", quality=95, subsampling=0), 12
    yield "turned.jpg", saved(rgb, "JPEG", quality=95, subsampling=0, exif=exif), 8
    yield "trailing.jpg", saved(rgb, "JPEG", quality=95, subsampling=0) + b"more", 8
    yield "rgb.png", saved(rgb, "PNG"), 0
    yield "sixteen.png", cv2.imencode(".png", sixteen[:, :, ::-1])[1].tobytes(), 0
    yield "palette.png", saved(rgb.quantize(8), "PNG"), 0
    yield "palette.gif", saved(rgb.quantize(8), "GIF"), 0
    yield "transparent.png", saved(hidden, "PNG"), 0
    yield "rgb.webp", saved(rgb, "WEBP", lossless=True), 0
    yield "rgb.bmp", saved(rgb, "BMP"), 0
    yield "cmyk.tif", saved(rgb.convert("CMYK"), "TIFF"), 3


KINDS = list(kinds())


@pytest.mark.parametrize(("name", "encoded", "tolerance"), KINDS, ids=[k[0] for k in KINDS])
def test_decoded_colours_and_places_are_those_that_were_drawn(name, encoded, tolerance):
    image = decode_image(encoded)
    assert image.dtype == np.uint8
    assert image.shape == (32, 48, 3)
    assert image.shape[:2] == encoded_size(encoded)
    off = np.abs(image.astype(int) - blocks())[:, [4, 20, 40]]  # away from where colours meet
    assert off.max() <= tolerance


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_grey_of_either_depth_gives_its_upper_eight_bits(rng, depth):
    values = rng.integers(0, np.iinfo(depth).max, (20, 30), dtype=depth)
    image = decode_image(cv2.imencode(".png", values)[1].tobytes())
    expected = values >> (8 * (depth().itemsize - 1))
    np.testing.assert_array_equal(image, np.repeat(expected[:, :, None], 3, 2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_half_an_image_file_is_rejected(rng, kind):
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    encoded = saved(noise, kind)
    assert encoded_size(encoded[: len(encoded) // 2]) == (64, 64)
    with pytest.raises(ValueError, match="cannot decode"):
        decode_image(encoded[: len(encoded) // 2])


def dataset(broken: dict[int, bytes] | None = None, boxes: dict[int, list] | None = None):
    """Eight images of noise with one box each, `broken` and `boxes` in place of some."""
    source = []
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        found = (boxes or {}).get(i, [[0.1, 0.1, 0.6, 0.6]])
        objects = {
            "bbox": [np.array(box, np.float32) for box in found],
            **{"label": [0] * len(found), "is_crowd": [False] * len(found)},
            **{"area": [1] * len(found), "id": list(range(len(found)))},
        }
        encoded = (broken or {}).get(i, saved(Image.fromarray(noise), "PNG"))
        name = f"{i}.png".encode()
        source.append({"image": encoded, "image/filename": name, "image/id": i, "objects": objects})
    return Dataset(source=source, name="noise", class_names=("a",), category_ids=(1,))


def config(workers=0, **data):
    return Config(
        data=Data(short_side=64, long_side=64, buckets=((64, 64),), **data),
        optimizer=Optimizer(batch_size=4),
        run=Run(workers=workers),
    )


def take(count, batches):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def half_a_file() -> bytes:
    noise = np.random.default_rng(9).integers(0, 256, (64, 64, 3), np.uint8)
    whole = saved(Image.fromarray(noise), "PNG")
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    "read",
    [functools.partial(train_batches, start_step=0), validation_batches],
    ids=["training", "validation"],
)
def test_a_corrupt_image_is_the_same_one_line_error_with_and_without_workers(read):
    errors = []
    for workers in (0, 1):
        batches = read(dataset({5: half_a_file()}), config(workers))
        with pytest.raises(DataError) as raised:
            take(2, batches)
        errors.append(raised.value)
        assert re.fullmatch(
            r"data.name: image 5 \(5.png\): cannot decode [^\n]*; [^\n]* without such images",
            str(errors[-1]),
        )
    assert errors[0].args == errors[1].args


def test_a_corrupt_header_is_found_before_the_first_step_and_evaluation_never_skips():
    with pytest.raises(DataError, match=r"image 5 \(5.png\): cannot read its header"):
        train_batches(dataset({5: b"nothing"}), config(), 0)
    with pytest.raises(DataError, match=r"image 5 \(5.png\): cannot read its header"):
        validation_batches(dataset({5: b"nothing"}), config(on_error="skip"))
    with pytest.raises(DataError, match=r"image 5 \(5.png\): cannot decode"):
        list(validation_batches(dataset({5: half_a_file()}), config(on_error="skip")))


def test_a_skipped_image_is_replaced_by_the_same_one_every_time_and_counted():
    broken, settings = dataset({5: half_a_file(), 6: b"nothing"}), config(on_error="skip")
    batches = take(28, train_batches(broken, settings, 0))  # sixteen epochs of seven
    ids = np.concatenate([loaded.batch.image_id for loaded in batches])
    replaced = np.concatenate([loaded.replaced for loaded in batches])
    assert not np.isin(ids, [5, 6]).any()
    assert replaced.sum() == 16
    assert len(set(ids[replaced].tolist())) > 1
    for start, hosts in ((9, 1), (3, 2)):
        shares = [take(5, train_batches(broken, settings, start, h, hosts)) for h in range(hosts)]
        again = [i for step in zip(*shares, strict=True) for p in step for i in p.batch.image_id]
        assert again == ids[start * 4 : start * 4 + 20].tolist()
    lines = []
    log = ReplacementLog(lines.append)
    for loaded in batches:
        log.record(loaded)
    assert log.count == 16
    assert [line.split()[1] for line in lines] == ["1", "2", "4", "8", "16"]
    assert input_notes(broken, settings) == ["1 images cannot be read and are skipped"]


def test_a_data_set_of_corrupt_images_only_is_an_error():
    with pytest.raises(DataError, match="cannot decode"):
        take(
            1,
            train_batches(
                dataset(dict.fromkeys(range(8), half_a_file())), config(on_error="skip"), 0
            ),
        )


def test_images_without_an_object_to_learn_from_are_skipped_or_kept():
    flat = [0.1, 0.1, 0.6, 0.1]
    some = dataset(boxes={1: [], 4: [flat], 6: [flat, [0.2, 0.2, 0.7, 0.7]]})
    for keep, left in ((False, {0, 2, 3, 5, 6, 7}), (True, set(range(8)))):
        batches = take(6, train_batches(some, config(keep_empty=keep), 0))
        assert {int(i) for loaded in batches for i in loaded.batch.image_id} == left
    notes = input_notes(some, config())
    assert notes[0].startswith("2 of 8 images have no object to learn from")
    assert notes[1:] == ["2 boxes without width or height are dropped"]
    none = dataset(boxes={i: [] for i in range(8)})
    with pytest.raises(ConfigError, match=r"data.train_split: no image of noise has an object"):
        train_batches(none, config(), 0)


def test_boxes_beyond_the_maximum_are_counted_in_a_warning():
    box = [0.1, 0.1, 0.6, 0.6]
    crowded = dataset(boxes={1: [box] * 5, 2: [box] * 9, 3: [box] * 4})
    (note,) = input_notes(crowded, config(max_boxes=4))
    assert note.startswith("warning: 2 images have more than 4 boxes; the smallest 6 are dropped")
    assert "`data.max_boxes` 9 " in note
    dropped = 0
    for loaded in take(2, train_batches(crowded, config(max_boxes=4), 0)):
        dropped += loaded.dropped_boxes.sum()
    assert dropped == 6
    assert not input_notes(crowded, config(max_boxes=9))


def test_ignored_crowds_count_towards_the_maximum_of_boxes():
    some = dataset(boxes={1: [[0.1, 0.1, 0.6, 0.6]] * 3})
    some.source[1]["objects"]["is_crowd"][2] = True
    settings = config(max_boxes=2)
    assert not input_notes(some, settings)
    ignoring = Config(data=settings.data, anchors=Anchors(crowd="ignore"))
    assert len(input_notes(some, ignoring)) == 1

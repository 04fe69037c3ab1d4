"""The embedded data set: reproducible, without overlap of its splits, with exact boxes."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorflow_datasets.object_detection import coco

from ghm_jax.config import Data
from ghm_jax.data import DigitScenes, open_dataset
from ghm_jax.data.prepare.digit_scenes import draw_background, draw_digits, split_digits
from ghm_jax.data.schema import COCO_CATEGORIES, detection_features, read_objects
from ghm_jax.data.transforms import decode_image


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(DigitScenes, "SCENES", {"train": 12, "validation": 5})


def scenes(count: int, split: str = "train"):
    """Scenes with the background they were drawn on."""
    for index in range(count):
        generator = np.random.default_rng((1, index))
        background = draw_background(generator)
        yield background, *draw_digits(background, *split_digits()[split], generator)


def test_two_builds_hold_the_same_bytes(few_scenes, tmp_path):
    for directory in ("a", "b"):
        open_dataset(Data(name="digit_scenes", dir=str(tmp_path / directory)), "train")
    for split in ("train", "validation"):
        a, b = (
            list(open_dataset(Data(name="digit_scenes", dir=str(tmp_path / d)), split).source)
            for d in ("a", "b")
        )
        assert len(a) == DigitScenes.SCENES[split]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_equal(x, y)


def test_the_features_are_those_of_coco_2017(few_scenes, tmp_path, monkeypatch):
    # The published builder asks TensorFlow for this one name and nothing else.
    monkeypatch.setattr(coco, "tf", SimpleNamespace(int64=np.int64))
    published = coco.Coco(config="2017", data_dir=tmp_path).info.features
    assert repr(detection_features(list(COCO_CATEGORIES))) == repr(published)

    dataset = open_dataset(Data(name="digit_scenes", dir=str(tmp_path)), "train")
    record = dataset.source[0]
    assert set(record) == {"image", "image/filename", "image/id", "objects"}
    assert set(record["objects"]) == {"area", "bbox", "id", "is_crowd", "label"}
    assert dataset.class_names == tuple("0123456789")
    assert dataset.category_ids == tuple(range(1, 11))


def test_ids_are_unique_and_areas_are_those_of_the_boxes(few_scenes, tmp_path):
    image_ids, object_ids = [], []
    for split in ("train", "validation"):
        for record in open_dataset(Data(name="digit_scenes", dir=str(tmp_path)), split).source:
            assert decode_image(record["image"]).shape == (160, 160, 3)
            objects = read_objects(record)
            boxes = objects.boxes_in_pixels(160, 160)
            sides = boxes[:, 2:] - boxes[:, :2]
            np.testing.assert_array_equal(objects.areas, sides.prod(axis=1))
            image_ids.append(int(record["image/id"]))
            object_ids += objects.ids.tolist()
    assert len(set(image_ids)) == len(image_ids) == 17
    assert len(set(object_ids)) == len(object_ids)


def test_an_interrupted_build_leaves_nothing_and_the_next_one_works(
    few_scenes, tmp_path, monkeypatch
):
    data = Data(name="digit_scenes", dir=str(tmp_path))
    with monkeypatch.context() as broken:
        broken.setattr("ghm_jax.data.prepare.digit_scenes.draw_digits", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_dataset(data, "train")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(open_dataset(data, "train")) == 12


def _interrupt(*_):
    raise KeyboardInterrupt


def test_no_scan_is_in_both_splits():
    (train, train_digits), (validation, validation_digits) = split_digits().values()
    assert len(train) + len(validation) == 1797
    assert 1390 <= len(train) <= 1410
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in validation}
    for digits in (train_digits, validation_digits):
        counts = np.bincount(digits, minlength=10)
        assert counts.max() - counts.min() <= 10


def test_small_objects_dominate_and_every_digit_occurs():
    boxes, labels, counts = [], [], []
    for _, _, b, digits in scenes(200):
        boxes.append(b)
        labels += digits.tolist()
        counts.append(len(b))
    sides = np.concatenate(boxes)[:, 2:] - np.concatenate(boxes)[:, :2]
    assert (sides.prod(axis=1) < 32**2).mean() > 0.6
    assert sides.max() > 64
    assert sides[:, 1].min() < 18
    assert 8 < np.mean(counts) < 10
    assert min(counts) >= 1
    assert max(counts) <= 17
    assert set(labels) == set(range(10))


def test_boxes_are_tight_around_what_was_drawn():
    for background, image, boxes, _ in scenes(30):
        changed = np.abs(image - background).max(axis=2) > 8
        inside = np.zeros_like(changed)
        for x0, y0, x1, y1 in boxes:
            inside[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = True
            box = changed[y0:y1, x0:x1]
            edges = (box[0], box[-1], box[:, 0], box[:, -1])
            assert all(edge.any() for edge in edges)
        # Faint pixels at the rim of a stroke may lie a pixel outside.
        assert (changed & ~inside).sum() <= 0.005 * changed.sum()
        assert boxes.min() >= 0
        assert boxes.max() <= 160


def test_digits_hardly_overlap():
    for _, _, boxes, _ in scenes(30):
        for i, a in enumerate(boxes.tolist()):
            for b in boxes[:i].tolist():
                width = min(a[2], b[2]) - max(a[0], b[0])
                height = min(a[3], b[3]) - max(a[1], b[1])
                smaller = min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
                assert max(0, width) * max(0, height) <= 0.1 * smaller


def test_the_ink_is_darker_than_the_paper():
    for background, image, boxes, _ in scenes(30):
        for x0, y0, x1, y1 in boxes[-3:]:  # the small ones, drawn last: nothing covers them
            difference = image[y0:y1, x0:x1].mean(axis=2) - background[y0:y1, x0:x1].mean(axis=2)
            assert difference.min() < -50
            assert difference.max() < 25


def test_build_and_read_need_no_tensorflow(few_scenes, tmp_path):
    code = (
        "import sys\n"
        "from ghm_jax.config import Data\n"
        "from ghm_jax.data import DigitScenes, open_dataset\n"
        "DigitScenes.SCENES = {'train': 2, 'validation': 1}\n"
        f"dataset = open_dataset(Data(name='digit_scenes', dir={str(tmp_path)!r}), 'train')\n"
        "print(len(list(dataset.source)), 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 False\n"  # and TFDS prints nothing

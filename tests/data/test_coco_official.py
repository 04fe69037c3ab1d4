"""Files in the layout of the official ones become `coco/2017`."""

import contextlib
import json

import cv2
import numpy as np
import pytest
from tiny import Listener

from ghm_jax.config import Data
from ghm_jax.data import open_dataset, prepare_coco
from ghm_jax.data.schema import COCO_CATEGORIES
from ghm_jax.exceptions import ArgumentError, UserError


@pytest.fixture
def source(tmp_path):
    """Directories and files named as the official ones, with two images per split."""
    folder = tmp_path / "official"
    (folder / "annotations").mkdir(parents=True)
    files = {
        "train2017": "instances_train2017",
        "val2017": "instances_val2017",
        "test2017": "image_info_test2017",
    }
    encoded = cv2.imencode(".jpg", np.full((20, 30, 3), 90, np.uint8))[1].tobytes()
    for number, (directory, name) in enumerate(files.items()):
        (folder / directory).mkdir()
        images = []
        for i in range(2):
            image_id = 100 * number + 9 * i
            file_name = f"{image_id:012}.jpg"
            (folder / directory / file_name).write_bytes(encoded)
            images.append({"id": image_id, "file_name": file_name, "width": 30, "height": 20})
        box = {"id": 1, "image_id": 100 * number, "category_id": 90, "bbox": [1, 2, 3, 4]}
        content = {
            "images": images,
            "categories": [{"id": i, "name": name} for name, i in COCO_CATEGORIES.items()],
        }
        if directory != "test2017":
            content["annotations"] = [box | {"area": 12.0, "iscrowd": 0}]
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return folder


def splits_of(out):
    found = {}
    for split in ("train", "validation", "test"):
        with contextlib.suppress(UserError):
            found[split] = len(open_dataset(Data(dir=str(out)), split))
    return found


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ((), {"train": 2, "validation": 2}),
        (("validation",), {"validation": 2}),
        (("train", "validation", "test"), {"train": 2, "validation": 2, "test": 2}),
    ],
)
def test_splits_are_those_requested_and_test_only_on_request(source, tmp_path, requested, expected):
    prepare_coco("2017", source, tmp_path / "data", splits=requested)
    assert splits_of(tmp_path / "data") == expected
    dataset = open_dataset(Data(dir=str(tmp_path / "data")), "validation")
    assert dataset.category_ids == tuple(COCO_CATEGORIES.values())


def test_fewer_images_than_the_official_ones_are_a_warning(source, tmp_path):
    listener = Listener()
    prepare_coco("2017", source, tmp_path / "a", splits=["validation"], progress=listener)
    assert [line.split(";")[0] for line in listener.lines] == [
        "warning: validation has 2 images, the official files 5,000"
    ]
    listener = Listener()
    prepare_coco(
        "2017", source, tmp_path / "b", splits=["validation"], subset=0.0004, progress=listener
    )
    assert "has 1 images, the official files 2;" in listener.lines[0]


def test_missing_splits_and_directories_are_named_with_the_remedy(source, tmp_path):
    out = tmp_path / "data"
    with pytest.raises(
        ArgumentError, match=r"splits: coco/2017 has no val; choose from train, vali"
    ):
        prepare_coco("2017", source, out, splits=["val"])
    (source / "test2017").rename(source / "elsewhere")
    with pytest.raises(ArgumentError, match=r"source: no test2017/ in .*; unpack"):
        prepare_coco("2017", source, out, splits=["test"])
    with pytest.raises(ArgumentError, match=r"source: neither train2014/ nor val2014/ in"):
        prepare_coco("2014", source, out)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["cut", "damaged", "intact"])
def test_archives_beside_the_files_are_checked(source, tmp_path, monkeypatch, kind):
    archive = source / "image_info_test2017.zip"
    size = 1_144_034
    with archive.open("wb") as file:
        file.truncate(size - (kind == "cut"))
    if kind == "intact":
        published = "e52f412dd7195ac8f98d782b44c6dd30ea10241e9f42521f67610fbe055a74f8"
        monkeypatch.setattr("ghm_jax.data.prepare.coco_official.sha256", lambda path, _: published)
        listener = Listener()
        prepare_coco("2017", source, tmp_path / "data", progress=listener)
        assert listener.lines[0] == "image_info_test2017.zip: checksum matches"
    else:
        with pytest.raises(
            ArgumentError, match=r"image_info_test2017.zip is not the official arch"
        ):
            prepare_coco("2017", source, tmp_path / "data")
        assert not (tmp_path / "data").exists()

"""Faults that are injected one by one are each named with a remedy."""

import dataclasses
import shutil
from collections import namedtuple
from importlib import metadata

import cv2
import numpy as np
import pytest
from tiny import tiny_config, write_dataset

from ghm_jax.analysis.doctor import examine
from ghm_jax.analysis.doctor.data import examine_data
from ghm_jax.cli import main
from ghm_jax.config import Config, Data
from ghm_jax.data.dataset import Dataset
from ghm_jax.data.schema import COCO_CATEGORIES

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**13, 0, 10**13))


def record(number, rng):
    """One image of 40 x 80 pixels with three valid objects."""
    image = rng.integers(0, 255, (40, 80, 3)).astype(np.uint8)
    start = rng.uniform(0, 0.5, (3, 2))
    boxes = np.concatenate([start, start + rng.uniform(0.2, 0.5, (3, 2))], axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) * 40 * 80
    return {
        "image": cv2.imencode(".png", image)[1].tobytes(),
        "image/id": number,
        "objects": {
            "bbox": boxes.astype(np.float32),
            "label": np.array([0, 1, 2]),
            "area": area.astype(np.int64),
            "is_crowd": np.zeros(3, bool),
        },
    }


def valid(rng):
    return [record(i + 1, rng) for i in range(5)]


def findings(
    records,
    monkeypatch,
    tmp_path,
    names=("a", "b", "c"),
    ids=(1, 2, 3),
    like_corners=False,
    encoding="utf-8",
    **data,
):
    """The findings for a data set of these records, which exists only in memory."""
    dataset = Dataset(records, "mine", names, ids, like_corners=like_corners)
    monkeypatch.setattr("ghm_jax.analysis.doctor.data.open_dataset", lambda data, split: dataset)
    chosen = {"validation_split": "train", "short_side": 40, "long_side": 80} | data
    chosen = Data(name="mine", dir=str(tmp_path), buckets=((64, 96), (96, 64)), **chosen)
    return list(examine_data(dataclasses.replace(Config(), data=chosen), True, True, 100, encoding))


def change_boxes(function):
    def change(record):
        record["objects"]["bbox"] = function(record["objects"]["bbox"])

    return change


def as_corner_and_size(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def without_height(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, :1], boxes[:, 3:]], axis=1)


FAULTS = {
    "cannot be decoded": lambda r: r.update({"image": b"no image"}),
    "id is used twice": lambda r: r.update({"image/id": 1}),
    "outside [0, 1]": change_boxes(lambda b: b * 40),
    "end is before": change_boxes(lambda b: b[:, [2, 3, 0, 1]]),
    "without width or height": change_boxes(without_height),
    "without a class": lambda r: r["objects"].update({"label": np.array([0, 3, -1])}),
    "a larger area than their box": lambda r: r["objects"].update({"area": np.full(3, 40 * 80)}),
}


def moved_out(boxes):
    """Clipped to the border, as a box beyond it is."""
    return np.concatenate([boxes[:, :1], np.ones((3, 1)), boxes[:, 2:3], np.ones((3, 1))], axis=1)


def reaching_out(boxes):
    """Clipped at the right; its area is still the whole one."""
    return np.concatenate([boxes[:, :1], np.full((3, 1), 0.95), boxes[:, 2:3], np.ones((3, 1))], 1)


FAULTS |= {
    "lay outside their image": change_boxes(moved_out),
    "reached beyond it and was clipped": change_boxes(reaching_out),
    "area is negative or so large": lambda r: r["objects"].update({"area": np.full(3, -600)}),
}


def test_valid_data_has_no_fault(rng, monkeypatch, tmp_path):
    found = findings(valid(rng), monkeypatch, tmp_path)
    assert all(f.good for f in found), found
    assert any("5 images, 15 objects, 0 images without any" in f.says for f in found)


@pytest.mark.parametrize("words", FAULTS)
def test_each_fault_of_a_record_is_named_with_a_remedy(rng, monkeypatch, tmp_path, words):
    records = valid(rng)
    FAULTS[words](records[3])
    (fault,) = (f for f in findings(records, monkeypatch, tmp_path) if not f.good)
    assert words in fault.says
    assert f"image {records[3]['image/id']})" in fault.says
    assert fault.remedy


def test_boxes_stored_as_corner_and_size_are_detected(rng, monkeypatch, tmp_path):
    records = valid(rng)
    for r in records:
        change_boxes(as_corner_and_size)(r)
    faults = [f for f in findings(records, monkeypatch, tmp_path) if not f.good]
    assert any("x, y, width, height" in f.remedy for f in faults)


def test_boxes_that_are_fractions_of_the_image_are_one_fault(rng, monkeypatch, tmp_path):
    """Divided by width and height once more than they should be."""
    records = valid(rng)
    for r in records:
        change_boxes(lambda b: b / np.array([40, 80, 40, 80], np.float32))(r)
    (fault,) = (f for f in findings(records, monkeypatch, tmp_path) if not f.good)
    assert "all boxes lie within 1 x 1 pixels" in fault.says
    assert "multiply" in fault.remedy


def test_nothing_but_crowd_regions_is_a_fault(rng, monkeypatch, tmp_path):
    records = valid(rng)
    for r in records:
        r["objects"]["is_crowd"] = np.ones(3, bool)
    (fault,) = (f for f in findings(records, monkeypatch, tmp_path) if not f.good)
    assert "all objects are crowd regions" in fault.says
    records[0]["objects"]["is_crowd"] = np.array([True, False, True])
    assert all(f.good for f in findings(records, monkeypatch, tmp_path))


def test_what_was_prepared_from_corners_is_a_fault(rng, monkeypatch, tmp_path):
    found = findings(valid(rng), monkeypatch, tmp_path, like_corners=True)
    (fault,) = (f for f in found if not f.good)
    assert "look like x0, y0, x1, y1" in fault.says
    assert "x, y, width, height" in fault.remedy


@pytest.fixture
def prepared(tmp_path):
    """A data set whose folder of pictures may be changed; its faults but that of `absent`."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    config = tiny_config(write_dataset(folder))

    def faults():
        found = [f for f in examine_data(config, True, True, 100) if not f.good]
        return [f for f in found if "(absent)" not in f.says]

    return folder, faults


def test_pictures_that_changed_since_they_were_prepared_are_a_fault(prepared):
    folder, faults = prepared
    assert not faults()
    for number in (2, 3):
        path = folder / f"train{number}.png"
        changed = bytearray(path.read_bytes())
        changed[-20] ^= 1  # of the same size
        path.write_bytes(changed)
    (folder / "validation4.png").write_bytes(b"")
    first, second = faults()
    assert f"2 of 10 pictures in {folder} changed since they were prepared (first: " in first.says
    assert first.says.endswith(("train2.png)", "train3.png)"))
    assert f"1 of 6 pictures in {folder} changed" in second.says
    assert "prepare it again" in first.remedy


def test_pictures_that_were_copied_touched_or_removed_are_no_fault(prepared):
    folder, faults = prepared
    for path in folder.glob("*.png"):
        path.touch()
    (folder / "train1.png").unlink()
    assert not faults()
    folder.rename(folder.parent / "elsewhere")
    config = tiny_config(folder.parent / "elsewhere" / "data")
    found = [f for f in examine_data(config, True, True, 100) if not f.good]
    assert not any("changed" in f.says for f in found)


@pytest.mark.parametrize("record", [None, "{", "[]", '{"train": 5}', '{"train": "\\u0000"}'])
def test_pictures_of_an_unknown_folder_are_no_fault(prepared, record):
    """As of data that was prepared before the folder was recorded."""
    folder, faults = prepared
    (folder / "train2.png").write_bytes(b"")
    assert faults()
    (file,) = folder.rglob("folders.json")
    if record is None:
        file.unlink()
    else:
        file.write_text(record)
    assert not faults()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "has no list 'images'"),
        (
            '{"images": [{"id": "1"}], "annotations": [], "categories": [{}]}',
            "images[0] has the id",
        ),
    ],
)
def test_broken_annotations_are_a_fault(rng, monkeypatch, tmp_path, text, words):
    path = tmp_path / "instances.json"
    path.write_text(text)
    (fault,) = (
        f for f in findings(valid(rng), monkeypatch, tmp_path, annotations=str(path)) if not f.good
    )
    assert "instances.json" in fault.says
    assert words in fault.says


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("more objects than data.max_boxes", {"max_boxes": 2}),
        ("fit in no bucket", {"short_side": 80, "long_side": 160}),
        ("not those of the run", {"classes": ("a", "b", "d")}),
        ("two classes have the names 'a' and 'a'", {"names": ("a", "a", "c")}),
        ("3 classes have 2 category ids", {"ids": (1, 1, 3)}),
        ("without an object (d)", {"names": ("a", "b", "c", "d"), "ids": (1, 2, 3, 4)}),
        ("no file gone.json", {"annotations": "gone.json"}),
        (
            "a different id than in COCO",
            {"names": tuple(COCO_CATEGORIES), "ids": tuple(range(1, 81))},
        ),
    ],
)
def test_each_fault_of_the_settings_is_named(rng, monkeypatch, tmp_path, words, settings):
    found = findings(valid(rng), monkeypatch, tmp_path, **settings)
    assert any(words in f.says and f.remedy for f in found if not f.good)


def test_class_names_that_the_terminal_cannot_show_are_a_fault(rng, monkeypatch, tmp_path):
    names = ("été", "猫", "cat")
    for encoding, said in (("ascii", "2 class names (été)"), ("latin-1", "1 class names (猫)")):
        found = findings(valid(rng), monkeypatch, tmp_path, names=names, encoding=encoding)
        (fault,) = (f for f in found if not f.good)
        assert said in fault.says
        assert "PYTHONUTF8" in fault.remedy
    assert all(f.good for f in findings(valid(rng), monkeypatch, tmp_path, names=names))


@pytest.mark.parametrize("labels", ["dark\n\nabsent\n", "dark\ndark \nabsent\n"])
def test_class_names_of_older_data_that_were_not_kept_are_a_fault(dataset_dir, tmp_path, labels):
    shutil.copytree(dataset_dir, tmp_path / "data")
    (file,) = (tmp_path / "data").rglob("*label.labels.txt")
    file.write_text(labels)
    faults = [f for f in examine_data(tiny_config(tmp_path / "data"), True, True, 10) if not f.good]
    assert len(faults) == 2  # one of each split
    assert all("prepare it again" in f.remedy for f in faults)


def test_a_broken_directory_is_a_fault_and_not_a_crash(dataset_dir, tmp_path):
    shutil.copytree(dataset_dir, tmp_path / "data")
    for path in (tmp_path / "data").rglob("features.json"):
        path.write_text("{")
    config = tiny_config(tmp_path / "data")
    faults = [f for f in examine_data(config, True, True, 10) if not f.good]
    assert faults
    assert all(f.remedy and "\n" not in f.says for f in faults)


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch):
    version = metadata.version
    found = {"flax": "0.1.0"}

    def fake(name):
        if name == "grain":
            raise metadata.PackageNotFoundError(name)
        return found.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", fake)
    faults = [f for f in examine(Config()) if not f.good and f.what == "packages"]
    assert [f.says.split()[0] for f in faults] == ["flax", "grain"]
    assert all(f.remedy.startswith("pip install") for f in faults)


def test_a_full_disk_and_a_wrong_decoder_are_faults(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 10**6))
    monkeypatch.setattr("ghm_jax.data.transforms.decode_image", lambda e: np.zeros((48, 32, 3)))
    faults = {f.what: f for f in examine(Config()) if not f.good}
    assert {"disk of runs", "disk of data", "decoders"} <= faults.keys()
    assert "free some space" in faults["disk of runs"].remedy


def test_the_command_exits_with_one_if_there_is_a_fault(
    dataset_dir, finished_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    main(["doctor"])
    assert capsys.readouterr().out.endswith("all is well\n")
    for source, words in (
        (str(finished_run[0].path), "has a checkpoint"),
        ("gone.py", "gone.py: no such experiment file"),
    ):
        with pytest.raises(SystemExit) as exit_:  # no object of the data set is `absent`
            main(["doctor", "--data.dir", str(dataset_dir), source])
        assert exit_.value.code == 1
        out, err = capsys.readouterr()
        assert err == ""
        assert words in out
        assert "1 classes without an object (absent)" in out
    with pytest.raises(SystemExit):
        main(["doctor", "--data.dir", "gone"])
    assert "BAD   data" in capsys.readouterr().out

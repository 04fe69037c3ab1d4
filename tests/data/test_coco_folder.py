"""Prepares a folder of images with COCO annotations, and checks what evaluation and training read
against the annotations themselves and against pycocotools."""

import contextlib
import io
import json
import math
import os
import shutil

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import Listener

from ghm_jax.config import Config, Data, Predict, Run
from ghm_jax.data import coco_ground_truth, open_dataset, prepare_folder, validation_batches
from ghm_jax.exceptions import ArgumentError, ConfigError, DataError, UserError

CATEGORIES = [{"id": 40, "name": "猫"}, {"id": 3, "name": "traffic light"}, {"id": 7, "name": "ox"}]
IMAGES = [  # id, file name, width, height
    (11, "ein Bild mit Lücke.jpg", 64, 48),
    (2_000_000_000, "写真/二.png", 50, 90),
    (5, "empty.jpg", 40, 40),
]
ANNOTATIONS = [  # id, image, category, bbox, area, crowd
    (1, 11, 40, [3.25, 4.5, 20.1, 30.7], 512.77, 0),
    (2, 11, 3, [0, 0, 64, 48], 3072, 1),
    (9, 2_000_000_000, 7, [10, 20, 39.99, 70], 2799.3, 0),
    (10, 2_000_000_000, 3, [-5, 80, 20, 20], 150, 0),  # beyond two borders
    (11, 2_000_000_000, 3, [5, 80, 0, 5], 0, 0),  # no width
]


@pytest.fixture
def folder(tmp_path):
    """A COCO folder: gaps in the category ids, names in several scripts, an empty image."""
    for _, name, width, height in IMAGES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, np.full((height, width, 3), 90, np.uint8))[1])
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    write(
        tmp_path,
        {
            "images": [
                dict(zip(("id", "file_name", "width", "height"), i, strict=True)) for i in IMAGES
            ],
            "annotations": [dict(zip(keys, a, strict=True)) for a in ANNOTATIONS],
            "categories": CATEGORIES,
        },
    )
    return tmp_path


def read(folder):
    return json.loads((folder / "instances.json").read_text())


def write(folder, annotations):
    (folder / "instances.json").write_text(json.dumps(annotations))


def prepare(folder, name="mine", split="validation"):
    source = (folder / "images", folder / "instances.json")
    return prepare_folder(name, folder / "data", {split: source})


def data(folder, name="mine"):
    sizes = {"short_side": 96, "long_side": 160, "buckets": ((160, 160),), "max_boxes": 4}
    return Data(name=name, dir=str(folder / "data"), **sizes)


def test_names_labels_and_category_ids_are_those_of_the_file(folder):
    assert prepare(folder) == folder / "data" / "mine" / "1.0.0"
    dataset = open_dataset(data(folder), "validation")
    assert dataset.name == "mine"
    assert len(dataset) == 3
    assert dataset.category_ids == (3, 7, 40)
    assert dataset.class_names == ("traffic light", "ox", "猫")


def test_ground_truth_equals_the_annotations(folder):
    prepare(folder)
    truth = coco_ground_truth(open_dataset(data(folder), "validation"))
    images = {(i["id"], i["file_name"], i["width"], i["height"]) for i in truth["images"]}
    assert images == set(IMAGES)
    assert {c["id"]: c["name"] for c in truth["categories"]} == {
        c["id"]: c["name"] for c in CATEGORIES
    }
    found = {a["id"]: a for a in truth["annotations"]}
    assert sorted(found) == [1, 2, 9, 10, 11]
    for number, image_id, category_id, bbox, area, crowd in ANNOTATIONS:
        a = found[number]
        assert (a["image_id"], a["category_id"], a["iscrowd"]) == (image_id, category_id, crowd)
        assert a["area"] == math.floor(area)  # TFDS areas are integers
        expected = [0, 80, 15, 10] if number == 10 else bbox  # clipped to the image
        np.testing.assert_allclose(a["bbox"], expected, atol=1e-3)


def test_boxes_of_a_batch_scale_back_to_the_annotated_ones(folder):
    prepare(folder)
    config = Config(data=data(folder), predict=Predict(batch_size=2), run=Run(workers=0))
    dataset = open_dataset(config.data, "validation")
    learned = {1: (11, 2), 9: (2_000_000_000, 1)}  # annotation: image, label
    for loaded in validation_batches(dataset, config):
        truth, image_ids = loaded.batch.truth, loaded.batch.image_id
        for i in range(2):
            original = truth.boxes[i].astype(np.float64) / np.tile(loaded.scale[i], 2)
            for number, image_id, _, (x, y, w, h), _, _ in ANNOTATIONS:
                if learned.get(number, (None,))[0] != image_ids[i]:
                    continue
                at = np.flatnonzero(truth.labels[i] == learned.pop(number)[1])
                assert len(at) == 1
                np.testing.assert_allclose(original[at[0]], [x, y, x + w, y + h], atol=1e-3)
                assert image_id == image_ids[i]
    assert not learned


def evaluate(truth, detections):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        scores = COCOeval(coco, coco.loadRes(detections), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return scores.stats[0]


@pytest.mark.parametrize("first_id", [0, 1])
def test_pycocotools_scores_the_ground_truth_itself_as_one(folder, first_id):
    source = read(folder)
    source["annotations"] = source["annotations"][:3]
    for number, annotation in enumerate(source["annotations"], start=first_id):
        annotation["id"] = number  # pycocotools itself takes an id of 0 for unmatched
    write(folder, source)
    prepare(folder)
    truth = coco_ground_truth(open_dataset(data(folder), "validation"))
    detections = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    assert evaluate(truth, detections) == pytest.approx(1.0)


def test_a_name_with_a_configuration_gets_its_own_directory(folder):
    prepare(folder, name="coco/2017")
    dataset = open_dataset(data(folder, "coco/2017"), "validation")
    assert dataset.name == "coco/2017"
    assert len(dataset) == 3


def test_an_empty_name_means_the_only_data_set(folder):
    prepare(folder, name="coco/2017")
    assert open_dataset(data(folder, ""), "validation").name == "coco/2017"
    prepare(folder, name="other")
    with pytest.raises(ConfigError, match=r"data.name: .* coco/2017, other in .*choose one"):
        open_dataset(data(folder, ""), "validation")


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*.*")}


def test_a_second_preparation_changes_nothing(folder):
    before = contents(prepare(folder))
    listener = Listener()
    source = (folder / "images", folder / "instances.json")
    again = prepare_folder("mine", folder / "data", {"validation": source}, progress=listener)
    assert listener.lines == [f"{again}: already prepared"]
    assert not listener.steps
    assert contents(again) == before


@pytest.mark.parametrize("change", ["annotations", "subset", "splits"])
def test_a_data_set_from_other_sources_is_never_overwritten(folder, change):
    before = contents(prepare(folder))
    source = (folder / "images", folder / "instances.json")
    splits, subset = {"validation": source}, 1.0
    if change == "annotations":
        write(folder, read(folder) | {"info": "changed"})
    elif change == "subset":
        subset = 0.5
    else:
        splits["train"] = source
    with pytest.raises(ArgumentError, match=r"out: .*mine exists already, .*; delete it"):
        prepare_folder("mine", folder / "data", splits, subset=subset)
    assert contents(folder / "data" / "mine" / "1.0.0") == before


def repaint(folder):
    path = folder / "images" / IMAGES[0][1]
    path.write_bytes(cv2.imencode(".jpg", np.full((48, 64, 3), 91, np.uint8))[1])
    os.utime(path, ns=(1, 1))  # as in another folder, or after a copy


def test_other_pictures_behind_the_same_annotations_are_refused(folder):
    before = contents(prepare(folder))
    repaint(folder)
    with pytest.raises(ArgumentError, match=r"out: .*mine exists already, made from other files"):
        prepare(folder)
    assert contents(folder / "data" / "mine" / "1.0.0") == before


def test_a_copy_of_the_pictures_is_the_same_data_set(folder):
    before = contents(prepare(folder))
    copy = folder / "copy"
    shutil.copytree(folder / "images", copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    listener = Listener()
    source = (copy, folder / "instances.json")
    again = prepare_folder("mine", folder / "data", {"validation": source}, progress=listener)
    assert listener.lines == [f"{again}: already prepared"]
    assert contents(again) == before


def test_the_folder_of_the_pictures_is_recorded_and_no_part_of_what_is_compared(folder):
    source = (folder / "images", folder / "instances.json")
    prepare_folder("mine", folder / "data", {"validation": source})
    shutil.copytree(folder / "images", folder / "copy")  # with the times
    copied = (folder / "copy", folder / "instances.json")
    prepare_folder("mine", folder / "other", {"validation": copied})
    first = open_dataset(data(folder), "validation")
    second = open_dataset(Data(name="mine", dir=str(folder / "other")), "validation[:2]")
    assert (first.folder, second.folder) == (folder / "images", folder / "copy")
    assert first.checksum == second.checksum


def test_data_prepared_before_the_pictures_were_recorded_is_compared_by_content(folder):
    path = prepare(folder) / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["sources"]["validation"]["images"]
    path.write_text(json.dumps(metadata))
    (path.parent / "folders.json").unlink()
    assert prepare(folder) == path.parent
    assert len(open_dataset(data(folder), "validation")) == 3
    repaint(folder)
    with pytest.raises(ArgumentError, match="made from other files"):
        prepare(folder)


def test_a_split_of_other_pictures_is_written_again(folder):
    source = (folder / "images", folder / "instances.json")
    splits = {"train": source, "validation": source}

    class StopWriting(Listener):
        def update(self, name, done, total, fields):
            if name == "write validation":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_folder("mine", folder / "data", splits, progress=StopWriting())
    repaint(folder)
    listener = Listener()
    prepare_folder("mine", folder / "data", splits, progress=listener)
    assert "train: already written" not in listener.lines
    for split in splits:
        for record in open_dataset(data(folder), split).source:
            name = record["image/filename"].decode()
            assert record["image"] == (folder / "images" / name).read_bytes()


def test_a_stopped_preparation_resumes_with_the_next_split(folder):
    """With the same result as one that was not stopped."""
    source = (folder / "images", folder / "instances.json")
    splits = {"train": source, "validation": source}

    class StopWriting(Listener):
        def update(self, name, done, total, fields):
            if name == "write validation" and done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_folder("mine", folder / "data", splits, progress=StopWriting())
    with pytest.raises(ConfigError, match=r"data\.dir: no prepared data set 'mine'"):
        open_dataset(data(folder), "train")

    class Names(Listener):
        def update(self, name, done, total, fields):
            self.steps.append(name)

    listener = Names()
    stopped = prepare_folder("mine", folder / "data", splits, progress=listener)
    assert [line for line in listener.lines if "warning" not in line] == ["train: already written"]
    assert {name for name in listener.steps if "write" in name} == {"write validation"}
    assert not list((folder / "data").rglob("*unfinished*"))
    straight = prepare_folder("mine", folder / "other", splits)
    for split in splits:
        assert len(open_dataset(data(folder), split)) == 3
    assert contents(stopped) == contents(straight)


def test_progress_counts_every_image_and_nothing_else_is_printed(folder, capfd):
    listener = Listener()
    source = (folder / "images", folder / "instances.json")
    prepare_folder("mine", folder / "data", {"validation": source}, progress=listener)
    assert listener.steps == [1, 2, 3] * 2  # checked, written
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_detected_before_anything_is_written(folder, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        ArgumentError, match=r"out: mine needs 0.0 GB .*, where 0.0 GB are free; free"
    ):
        prepare(folder)
    assert not (folder / "data").exists()


@pytest.mark.parametrize("which", ["images", "annotations"])
def test_for_a_cloud_path_the_remedy_is_to_mount_the_bucket(folder, which):
    paths = {"images": folder / "images", "annotations": "instances.json"}
    paths[which] = "gs://bucket/somewhere"
    splits = {"train": (paths["images"], paths["annotations"])}
    with pytest.raises(UserError, match=r"gs://bucket/somewhere .* mount the bucket \(gcsfuse"):
        prepare_folder("mine", folder / "data", splits)


def many_images(folder, count):
    """A folder of `count` images, one object in each."""
    (folder / "images").mkdir(exist_ok=True)
    encoded = cv2.imencode(".png", np.zeros((8, 12, 3), np.uint8))[1].tobytes()
    for i in range(count):
        (folder / "images" / f"{i}.png").write_bytes(encoded)
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    write(
        folder,
        {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(count)],
            "annotations": [
                dict(zip(keys, (i + 1, i, 40, [1, 1, 4, 4], 16, 0), strict=True))
                for i in range(count)
            ],
            "categories": CATEGORIES,
        },
    )


def ids(folder, name):
    return {int(record["image/id"]) for record in open_dataset(data(folder, name), "train").source}


def test_a_subset_has_the_requested_size_and_is_part_of_every_larger_one(tmp_path):
    many_images(tmp_path, 60)
    source = {"train": (tmp_path / "images", tmp_path / "instances.json")}
    found = []
    for name, share in (("a", 0.001), ("b", 0.1), ("c", 0.5), ("d", 1.0)):
        prepare_folder(name, tmp_path / "data", source, subset=share)
        found.append(ids(tmp_path, name))
        truth = coco_ground_truth(open_dataset(data(tmp_path, name), "train"))
        assert {a["image_id"] for a in truth["annotations"]} == found[-1]
    assert [len(each) for each in found] == [1, 6, 30, 60]
    assert found[0] < found[1] < found[2] < found[3]
    assert found[2] != set(range(30))  # not the first ones


def test_images_outside_the_subset_need_not_exist(tmp_path):
    many_images(tmp_path, 10)
    source = {"train": (tmp_path / "images", tmp_path / "instances.json")}
    prepare_folder("a", tmp_path / "data", source, subset=0.3)
    for i in set(range(10)) - ids(tmp_path, "a"):
        (tmp_path / "images" / f"{i}.png").unlink()
    prepare_folder("b", tmp_path / "data", source, subset=0.3)
    assert ids(tmp_path, "b") == ids(tmp_path, "a")


def test_a_test_split_needs_no_annotations(folder):
    source = read(folder)
    del source["annotations"]
    write(folder, source)
    prepare(folder, split="test")
    truth = coco_ground_truth(open_dataset(data(folder), "test"))
    assert {image["id"] for image in truth["images"]} == {row[0] for row in IMAGES}
    assert truth["annotations"] == []


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "absent",
            "validation",
            r"data.dir: no prepared data set .absent. in .*; prepare it there with ghm-jax da",
        ),
        ("mine", "train", r"data.train_split: mine has no split 'train'; choose from validation"),
        ("mine", "validation[:0]", r"data.validation_split: .* holds no images; cho"),
        (
            "mine",
            "validation[",
            r"data.validation_split: .* is not a slice of a split; write it like",
        ),
    ],
)
def test_a_missing_data_set_or_split_is_named_with_the_remedy(folder, name, split, message):
    prepare(folder)
    with pytest.raises(ConfigError, match=message) as error:
        open_dataset(data(folder, name), split)
    assert "\n" not in str(error.value)


def breakages():
    def change(part, entry, **fields):
        def apply(folder):
            source = read(folder)
            source[part][entry].update(fields)
            write(folder, source)

        return apply

    def remove(part):
        def apply(folder):
            source = read(folder)
            del source[part]
            write(folder, source)

        return apply

    def text(content):
        return lambda folder: (folder / "instances.json").write_text(content)

    return {
        "missing image": (
            lambda folder: (folder / "images" / "empty.jpg").unlink(),
            r"validation: no image .*empty.jpg, .* add it",
        ),
        "broken image": (
            lambda folder: (folder / "images" / "empty.jpg").write_bytes(b"?"),
            r"validation: .*empty.jpg is not an image of a known format; replace",
        ),
        "missing json": (
            lambda folder: (folder / "instances.json").unlink(),
            r"validation: no annotation file .*instances.json; give",
        ),
        "no json": (text("{"), r"instances.json: is not JSON .*; write it again"),
        "list": (text("[]"), r"has no list 'images', .*; give a COCO instances JSON"),
        "no annotations": (remove("annotations"), r"has no list 'annotations'; give"),
        "no category name": (
            change("categories", 1, name=None),
            r"instances.json: categories\[1\] has the name None; it must be a text without",
        ),
        "same category name": (
            change("categories", 1, name="ox"),
            r"two classes have the names 'ox' and 'ox'; give every category a name",
        ),
        "text as image id": (
            change("images", 0, id="11"),
            r"images\[0\] has the id '11'; it must be a whole number",
        ),
        "same file twice": (
            change("images", 0, file_name="empty.jpg"),
            r"images\[0\] and images\[2\] have the same file_name, 'empty.jpg'; list",
        ),
        "huge image id": (
            change("images", 0, id=2**31),
            r"images\[0\] has the id 2147483648; .*32 bits",
        ),
        "wrong size": (
            change("images", 0, width=48, height=64),
            r"Lücke.jpg has 64x48 pixels, but the annotations say 48x64; save",
        ),
        "unknown image": (
            change("annotations", 2, image_id=12),
            r"annotations\[2\] refers to image 12 .* does not list; add or remove",
        ),
        "unknown category": (
            change("annotations", 2, category_id=1),
            r"annotations\[2\] refers to .* category 1, which the file does not list",
        ),
        "negative width": (
            change("annotations", 0, bbox=[1, 2, -3, 4]),
            r"annotations\[0\] has the bbox \[1, 2, -3, 4\]; it must be",
        ),
        "nan": (change("annotations", 0, bbox=[1, 2, math.nan, 4]), r"annotations\[0\] has the bb"),
    }


@pytest.mark.parametrize("breakage", breakages())
def test_bad_input_is_one_line_and_nothing_is_written(folder, breakage):
    damage, message = breakages()[breakage]
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        prepare(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "data").exists()


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("My Set", "train", "name: 'My Set' cannot be the name of a data set; use lower-case"),
        ("../up", "train", "name: .* cannot be the name of a data set"),
        ("mine", "Train-1", "splits: Train-1 cannot be the name of a split; use lower-case"),
    ],
)
def test_names_that_tfds_rejects_are_refused(folder, name, split, message):
    with pytest.raises(ArgumentError, match=message):
        prepare(folder, name, split)


def test_splits_must_share_their_categories(folder):
    other = read(folder)
    other["categories"][0]["id"], other["annotations"] = 41, []
    (folder / "other.json").write_text(json.dumps(other))
    images = folder / "images"
    splits = {"train": (images, folder / "instances.json"), "test": (images, folder / "other.json")}
    with pytest.raises(DataError, match="test: the categories differ from those of train; give"):
        prepare_folder("mine", folder / "data", splits)


def test_a_data_set_of_another_schema_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    class OnlyImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {
                "train": iter([(0, {"image": cv2.imencode(".png", np.ones((2, 2)))[1].tobytes()})])
            }

        def _generate_examples(self):
            raise NotImplementedError

    with contextlib.redirect_stdout(io.StringIO()):
        OnlyImages(data_dir=tmp_path).download_and_prepare(
            file_format="array_record", download_dir=tmp_path / "downloads"
        )
    with pytest.raises(ConfigError, match=r"only_images lacks .*objects.bbox.*; prepare it"):
        open_dataset(Data(name="only_images", dir=str(tmp_path)), "train")


def test_real_images_keep_their_annotations(shared, tmp_path):
    source = shared / "data" / "coco_val2017_open"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/coco_val2017_open")
    prepare_folder(
        "mine", tmp_path / "data", {"val": (source / "val", source / "instances_val.json")}
    )
    dataset = open_dataset(data(tmp_path), "val")
    truth = coco_ground_truth(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO(str(source / "instances_val.json"))
    assert dataset.category_ids == tuple(sorted(official.cats))
    assert {i["id"] for i in truth["images"]} == set(official.imgs)
    assert {a["id"] for a in truth["annotations"]} == set(official.anns)
    for annotation in truth["annotations"]:
        expected = official.anns[annotation["id"]]
        np.testing.assert_allclose(annotation["bbox"], expected["bbox"], atol=1e-3)
        for key in ("image_id", "category_id", "iscrowd"):
            assert annotation[key] == expected[key]

"""TFDS's own `coco/2017` builder, on files made here, is the reference for what we prepare.

It needs TensorFlow: pip install "ghm-jax[tensorflow]".
"""

import json
import warnings

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from ghm_jax.data import prepare_coco
from ghm_jax.data.schema import COCO_CATEGORIES

tf = pytest.importorskip("tensorflow", reason="TFDS's own coco builder needs TensorFlow")
reader = pytest.importorskip("array_record.python.array_record_data_source")

FILES = {
    "train": ("train2017", "instances_train2017"),
    "validation": ("val2017", "instances_val2017"),
    "test": ("test2017", "image_info_test2017"),
}


@pytest.fixture
def official(tmp_path, rng):
    """Images and annotations in the official layout: crowds, images without boxes."""
    folder = tmp_path / "official"
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": i, "name": name} for name, i in COCO_CATEGORIES.items()]
    for split, (directory, name) in FILES.items():
        (folder / directory).mkdir()
        images, annotations = [], []
        for image_id in rng.choice(500_000, 9, replace=False).tolist():
            height, width = (int(side) for side in rng.integers(20, 60, 2))
            pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            file_name = f"{image_id:012}.jpg"
            (folder / directory / file_name).write_bytes(cv2.imencode(".jpg", pixels)[1])
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
            for _ in range(int(rng.integers(0, 4))):
                x, y, w, h = np.round(rng.uniform(0, 10, 4), 2).tolist()
                annotations.append(
                    {
                        "id": int(rng.integers(1, 2**40)),
                        "image_id": image_id,
                        "category_id": int(rng.choice(list(COCO_CATEGORIES.values()))),
                        "bbox": [x, y, w, h],
                        "area": round(float(rng.uniform(0, 100)), 4),
                        "iscrowd": int(rng.integers(2)),
                    }
                )
        content = {"images": images, "categories": categories}
        if split != "test":
            content["annotations"] = annotations
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return folder


def records(directory, split):
    """{feature: its stored bytes} of every record of a split, in their order."""
    paths = sorted(map(str, directory.glob(f"*-{split}.array_record-*")))
    source = reader.ArrayRecordDataSource(paths)
    found = []
    for i in range(len(source)):
        features = tf.train.Example.FromString(source[i]).features.feature
        found.append({key: features[key].SerializeToString() for key in features})
    return found


@pytest.mark.slow
def test_records_are_byte_for_byte_those_of_the_official_builder(official, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, urls: dict.fromkeys(urls, str(official)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of TensorFlow itself
        builder = tfds.builder("coco/2017", data_dir=tmp_path / "theirs")
        builder.download_and_prepare(
            file_format="array_record", download_dir=tmp_path / "downloads"
        )
    ours = prepare_coco("2017", official, tmp_path / "ours", splits=tuple(FILES))
    for split in FILES:
        expected = records(builder.data_path, split)
        assert len(expected) == 9
        for mine, theirs in zip(records(ours, split), expected, strict=True):
            assert {k: v for k, v in mine.items() if v != theirs[k]} == {}, theirs
    found = tfds.builder_from_directory(ours).info.features
    assert found.to_json() == builder.info.features.to_json()
    assert found["objects"]["label"].names == builder.info.features["objects"]["label"].names

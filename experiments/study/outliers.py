"""The embedded data set with outliers among its training labels: wrong classes, missing boxes."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ghm_jax.config import Data
from ghm_jax.data import coco_ground_truth, open_dataset, prepare_folder

SOURCE = "digit_scenes"
KINDS = ("wrong_labels", "missing_boxes")


def make_outliers(name: str, data_dir: str) -> None:
    """Makes the data set `wrong_labels_P` or `missing_boxes_P`, P in percent, if it is not there.

    The images are those of the embedded data set, and validation is unchanged. Other names are
    left alone.
    """
    kind, _, percent = name.rpartition("_")
    if kind not in KINDS or (Path(data_dir) / name).exists():
        return
    with tempfile.TemporaryDirectory() as temporary:
        splits = {}
        for split in ("train", "validation"):
            dataset = open_dataset(Data(name=SOURCE, dir=data_dir), split)
            truth = coco_ground_truth(dataset)
            if split == "train":
                truth = corrupted(truth, kind, int(percent) / 100)
            folder = Path(temporary) / split
            folder.mkdir()
            for record, image in zip(dataset.source, truth["images"], strict=True):
                (folder / image["file_name"]).write_bytes(record["image"])
            (folder / "instances.json").write_text(json.dumps(truth))
            splits[split] = (folder, folder / "instances.json")
        prepare_folder(name, data_dir, splits)


def corrupted(truth: dict[str, Any], kind: str, share: float, seed: int = 0) -> dict[str, Any]:
    """A share of the objects, drawn at random, with another class or without a box."""
    rng = np.random.default_rng(seed)
    chosen = set(
        rng.permutation(len(truth["annotations"]))[
            : round(share * len(truth["annotations"]))
        ].tolist()
    )
    classes = [category["id"] for category in truth["categories"]]
    annotations = []
    for number, annotation in enumerate(truth["annotations"]):
        if number in chosen:
            if kind == "missing_boxes":
                continue
            others = [c for c in classes if c != annotation["category_id"]]
            annotation = annotation | {"category_id": int(rng.choice(others))}
        annotations.append(annotation)
    return {**truth, "annotations": annotations}

"""The COCO figures of detections: ground truth and results in, numbers out."""

import contextlib
import io
import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ghm_jax.config import Config
from ghm_jax.data.dataset import Dataset
from ghm_jax.data.ground_truth import coco_ground_truth
from ghm_jax.exceptions import ConfigError

Evaluator = Literal["hotcoco", "pycocotools"]

METRICS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "of objects below 32 x 32 pixels",
    "APm": "of objects from 32 x 32 to 96 x 96",
    "APl": "of larger objects",
    "AR1": "average recall with 1 detection an image",
    "AR10": "with 10",
    "AR100": "with 100",
    "ARs": "with 100, of objects below 32 x 32 pixels",
    "ARm": "with 100, of objects from 32 x 32 to 96 x 96",
    "ARl": "with 100, of larger objects",
}
"""The twelve COCO figures in the order of every COCO evaluator, with what they mean."""


def load_ground_truth(config: Config, dataset: Dataset) -> dict[str, Any]:
    """COCO instances to score against: the official file where one is named, else the data set's.

    Raises:
        ConfigError: the file is missing, or its categories or images are not those of the data set.
    """
    if not config.data.annotations:
        return coco_ground_truth(dataset)
    path = Path(config.data.annotations)
    if not path.is_file():
        raise ConfigError(f"data.annotations: no file {path}; set it to the instances JSON")
    truth = json.loads(path.read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    ours = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    if names != ours:
        raise ConfigError(f"data.annotations: the categories of {path} are not {dataset.name}'s")
    return truth


def match_images(
    truth: dict[str, Any], image_ids: Collection[int], *, part: bool
) -> dict[str, Any]:
    """Ground truth of exactly the images that were looked at.

    An image that an evaluator knows and the detector never saw would count as one without
    detections and lower every figure without a word.

    Args:
        truth: COCO instances.
        image_ids: of the data set.
        part: the data set is a part of its split, so that `truth` may hold more images; those go.

    Raises:
        ConfigError: an image is missing on either side.
    """
    ids, known = set(image_ids), {image["id"] for image in truth["images"]}
    missing = (ids - known) | (set() if part else known - ids)
    if missing:
        where = "data.annotations" if ids - known else "the data set"
        raise ConfigError(
            f"data.annotations: {len(missing)} images, for example {min(missing)}, are not in "
            f"{where}; give the file that belongs to this split"
        )
    kept = {key: truth[key] for key in truth.keys() - {"images", "annotations"}}
    kept["images"] = [image for image in truth["images"] if image["id"] in ids]
    kept["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
    return kept


def load_results(path: str | Path, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Detections from a JSON file in COCO results form.

    Args:
        path: the file.
        truth: COCO instances that the detections are to be scored against.

    Raises:
        ConfigError: no such file, another form, or an image or category that `truth` lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give detections in COCO results form (JSON)")
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON ({error}); write it anew") from error
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: is no list; COCO results are a list of detections")
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for number, row in enumerate(rows):
        try:
            image_id, category_id, score = row["image_id"], row["category_id"], row["score"]
            values = [float(score), *map(float, row["bbox"])]
            if len(values) != 5 or not all(map(math.isfinite, values)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{path}: row {number} needs image_id, category_id, score and bbox [x, y, width, "
                "height], all finite; correct it"
            ) from None
        if image_id not in images or category_id not in categories:
            key, value = (
                ("image", image_id) if image_id not in images else ("category", category_id)
            )
            raise ConfigError(
                f"{path}: row {number} is of {key} {value!r}, which the ground truth lacks; "
                "give the split and annotations that the file belongs to"
            )
    return rows


def score(
    truth: dict[str, Any], detections: Iterable[dict[str, Any]], evaluator: Evaluator = "hotcoco"
) -> tuple[dict[str, float], dict[str, float]]:
    """The twelve COCO figures, and AP per class name; -1 where there is no such object.

    Args:
        truth: COCO instances.
        detections: COCO results.
        evaluator: which library computes; both have one interface.
    """
    found = list(detections)
    if not found:  # the evaluators cannot read an empty list: a box of nothing finds nothing
        image, category = truth["images"][0]["id"], truth["categories"][0]["id"]
        found = [{"image_id": image, "category_id": category, "bbox": [0, 0, 0, 0], "score": 0.0}]
    with contextlib.redirect_stdout(io.StringIO()):
        coco, coco_eval_class = _evaluator_classes(evaluator)
        ground = coco()
        ground.dataset = {"info": {}, **truth}
        ground.createIndex()
        coco_eval = coco_eval_class(ground, ground.loadRes(found), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    metrics = dict(zip(METRICS, (float(x) for x in coco_eval.stats), strict=True))
    # precision: IoU, recall, category, area, detections; of the last two: all, at most 100
    precision = np.asarray(coco_eval.eval["precision"])[:, :, :, 0, -1]
    names = {category["id"]: category["name"] for category in truth["categories"]}
    per_class = {}
    for k, category_id in enumerate(sorted(names)):
        values = precision[:, :, k]
        values = values[values > -1]
        per_class[names[category_id]] = float(values.mean()) if values.size else -1.0
    return metrics, per_class


def _evaluator_classes(evaluator: Evaluator) -> tuple[Any, Any]:
    """COCO and COCOeval: hotcoco's have the interface of pycocotools'."""
    if evaluator == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from hotcoco import COCO, COCOeval
    return COCO, COCOeval

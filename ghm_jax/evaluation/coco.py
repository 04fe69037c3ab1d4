"""COCO evaluation: ground truth and detections in, the twelve figures out."""

import contextlib
import io
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ghm_jax.config import Config
from ghm_jax.data.coco_fields import DETECTION, check_scale, read_instances, read_json, read_rows
from ghm_jax.data.dataset import Dataset
from ghm_jax.data.ground_truth import coco_ground_truth
from ghm_jax.exceptions import ConfigError, DataError
from ghm_jax.runs.metrics import METRICS

Evaluator = Literal["hotcoco", "pycocotools"]


def load_ground_truth(config: Config, dataset: Dataset) -> dict[str, Any]:
    """COCO instances to score against: from `data.annotations`, or else from the data set.

    Without `annotations` if the file is a list of test images.

    Raises:
        ConfigError: the file is missing, or its categories are not those of the data set.
        DataError: the file is not in COCO's form; see `read_instances`.
    """
    if not config.data.annotations:
        return coco_ground_truth(dataset)
    path = Path(config.data.annotations)
    if not path.is_file():
        raise ConfigError("data.annotations", f"no file {path}", "set it to the instances JSON")
    truth = read_instances(path)
    names = {category["id"]: category["name"] for category in truth.categories}
    ours = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    if names != ours:
        raise ConfigError(
            "data.annotations",
            f"the categories of {path} are not those of {dataset.name}",
            "give the file that belongs to this data set",
        )
    return {name: rows for name, rows in truth._asdict().items() if rows is not None}


def match_images(
    truth: dict[str, Any], image_ids: Collection[int], *, part: bool
) -> dict[str, Any]:
    """Ground truth of exactly the images of a data set.

    Images that the evaluator has but the detector never saw would count as images without
    detections and silently lower every figure.

    Args:
        truth: COCO instances.
        image_ids: of the data set.
        part: the data set is a subset of its split: other images in `truth` are removed.

    Raises:
        ConfigError: an image is missing on either side.
    """
    ids, known = set(image_ids), {image["id"] for image in truth["images"]}
    missing = (ids - known) | (set() if part else known - ids)
    if missing:
        where = "data.annotations" if ids - known else "the data set"
        raise ConfigError(
            "data.annotations",
            f"{len(missing)} images, for example {min(missing)}, are not in {where}",
            "give the file that belongs to this split",
        )
    kept = {key: truth[key] for key in truth.keys() - {"images", "annotations"}}
    kept["images"] = [image for image in truth["images"] if image["id"] in ids]
    kept["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
    return kept


def load_results(path: str | Path, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Detections from a JSON file in COCO results format.

    Args:
        path: the file.
        truth: COCO instances to score the detections against.

    Raises:
        ConfigError: no such file.
        DataError: not a list of detections, a value against the rule of its field, boxes that look
            divided by width and height, or an image or category that is not in `truth`.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            str(path), "no such file", "give COCO results (a JSON file of detections)"
        )
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(str(path), "is not a list", "COCO results are a list of detections")
    found = read_rows(path, "detections", rows, DETECTION)
    check_scale(path, found)
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for number, row in enumerate(found):
        for key, known in (("image_id", images), ("category_id", categories)):
            if row[key] not in known:
                raise DataError(
                    str(path),
                    f"detections[{number}] has the {key} {row[key]}, which the ground truth does "
                    "not list",
                    "give the split and annotations that the file belongs to",
                )
    return found


def score(
    truth: dict[str, Any], detections: Iterable[dict[str, Any]], evaluator: Evaluator = "hotcoco"
) -> tuple[dict[str, float], dict[str, float]]:
    """The twelve COCO figures by name (`METRICS`), and AP by class name; -1: no such object.

    Args:
        truth: COCO instances.
        detections: COCO results.
        evaluator: the library that computes the figures.
    """
    figures, precision = precision_of(truth, detections, evaluator)
    metrics = dict(zip(METRICS, figures, strict=True))
    names = {category["id"]: category["name"] for category in truth["categories"]}
    per_class = {}
    for k, category_id in enumerate(sorted(names)):
        values = precision[:, :, k]
        values = values[values > -1]
        per_class[names[category_id]] = float(values.mean()) if values.size else -1.0
    return metrics, per_class


def precision_of(
    truth: dict[str, Any], detections: Iterable[dict[str, Any]], evaluator: Evaluator = "hotcoco"
) -> tuple[list[float], np.ndarray]:
    """The twelve COCO figures, and precision by IoU (0.50 to 0.95), recall and category, of all
    areas and 100 detections; -1: no such object. Arguments as for `score`."""
    found = list(detections)
    if not found:  # the evaluators reject an empty list: an empty box of score 0 matches nothing
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
    # Axes: IoU, recall, category, area, detections; of the last two: all areas, 100 detections.
    precision = np.asarray(coco_eval.eval["precision"])[:, :, :, 0, -1]
    return [float(x) for x in coco_eval.stats], precision


def _evaluator_classes(evaluator: Evaluator) -> tuple[Any, Any]:
    """COCO and COCOeval; those of hotcoco have the same interface as those of pycocotools."""
    if evaluator == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from hotcoco import COCO, COCOeval
    return COCO, COCOeval

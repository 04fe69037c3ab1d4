"""From a run to COCO figures and a report."""

import contextlib
import functools
import io
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ghm_jax.checkpoint import Checkpoints
from ghm_jax.config import Config, ConfigError, flatten
from ghm_jax.data.dataset import Dataset, open_dataset
from ghm_jax.data.ground_truth import coco_ground_truth
from ghm_jax.data.loader import validation_batches
from ghm_jax.data.transforms import decode_image
from ghm_jax.parallel import (
    Device,
    choose_devices,
    merge_batch,
    parallelize,
    replicate,
    split_batch,
)
from ghm_jax.plots.drawing import Sample
from ghm_jax.plots.report import read_history, render_report
from ghm_jax.progress import Progress, Silent
from ghm_jax.rundir import RunDirectory, load_run, write_text
from ghm_jax.schedule import make_optimizer
from ghm_jax.step import TrainState, init_state, make_model, predict_step

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


def evaluate(
    run_dir: str | Path,
    *,
    split: str | None = None,
    evaluator: Evaluator = "hotcoco",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores the newest checkpoint of a run and writes its report.

    Args:
        run_dir: of a run that has a checkpoint.
        split: TFDS split; None: the run's validation split.
        evaluator: hotcoco (fast) or pycocotools (the referee); the figures are the same.
        progress: who hears about it.

    Returns:
        What `metrics.json` holds: the twelve `METRICS`, `per_class` {class name: AP}, `step`,
        `split`, `images`, `evaluator` and `ground_truth`.

    Raises:
        ConfigError: no run, no checkpoint, no data.
    """
    progress = progress or Silent()
    run, config = load_run(run_dir)
    split = split or config.data.validation_split
    devices = choose_devices(config.run.devices)
    config.check(len(devices))
    dataset = open_dataset(config.data, split)
    if config.data.classes and dataset.class_names != config.data.classes:
        raise ConfigError(
            f"data.name: {dataset.name} has other classes than {run.path} was trained on; "
            "evaluate on a data set with the same class names"
        )
    truth = load_ground_truth(config, dataset)

    variables, step = restore_variables(run, config, devices[0])
    progress.say(f"{run.path}: evaluating step {step} on {len(dataset)} images of {dataset.name}")
    variables = replicate(variables, devices)
    detections = detect(config, dataset, variables, devices, progress)
    progress.close()
    metrics, per_class = score(truth, detections, evaluator)
    result = {
        **metrics,
        "per_class": per_class,
        "step": step,
        "split": split,
        "images": len(dataset),
        "evaluator": evaluator,
        "ground_truth": config.data.annotations or f"tfds:{dataset.name}",
    }
    write_text(run.detections, json.dumps(detections))
    write_text(run.metrics, json.dumps(result, indent=2) + "\n")
    write_text(run.report, report(run, config, dataset, result, truth, detections))
    return result


def restore_variables(
    run: RunDirectory, config: Config, device: Device
) -> tuple[dict[str, Any], int]:
    """The `params` and `batch_stats` of a run's newest checkpoint, and the steps done."""
    state = restore_state(run, config, device)
    return {"params": state.params, "batch_stats": state.batch_stats}, int(state.step)


def restore_state(run: RunDirectory, config: Config, device: Device) -> TrainState:
    """The state in a run's newest checkpoint, on one device."""
    if not run.checkpoints.is_dir():
        raise ConfigError(f"{run.path}: no checkpoint yet; train the run first")
    model = make_model(config, len(config.data.classes))
    optimizer = make_optimizer(config)
    shapes = jax.eval_shape(functools.partial(init_state, config, model, optimizer))
    place = jax.sharding.SingleDeviceSharding(device)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with Checkpoints(run.checkpoints) as checkpoints:
        return checkpoints.restore(like)


def detect(
    config: Config,
    dataset: Dataset,
    variables: dict[str, Any],
    devices: list[Device],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Detections of every image of a data set, once, in COCO results form.

    Boxes are in pixels of the original images, categories the original ids.
    """
    model = make_model(config, len(dataset.class_names))
    step = functools.partial(predict_step, config=config, model=model)
    step = parallelize(step, devices, config.run.wrapper, split_output=True)
    results, done = [], 0
    batches = validation_batches(dataset, config)
    for batch in batches:
        found = merge_batch(step(variables, split_batch(batch, len(devices))))
        for i in np.flatnonzero(batch["valid"]):
            boxes = found.boxes[i] / np.tile(batch["scale"][i], 2)
            results += _coco_results(
                int(batch["image_id"][i]), boxes, found.scores[i], found.labels[i], dataset
            )
        done += int(batch["valid"].sum())
        progress.update("evaluate", done, len(dataset), {})
    if done != len(dataset):
        raise AssertionError(f"{done} of {len(dataset)} images were evaluated")
    return results


def _coco_results(
    image_id: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, dataset: Dataset
) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image_id,
            "category_id": dataset.category_ids[label],
            "bbox": [round(x, 3) for x in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(score, 5),
        }
        for (x0, y0, x1, y1), score, label in zip(
            boxes.tolist(), scores.tolist(), labels.tolist(), strict=True
        )
        if label >= 0
    ]


def load_ground_truth(config: Config, dataset: Dataset) -> dict[str, Any]:
    """COCO instances to score against: the official file where one is named, else the data set's.

    Raises:
        ConfigError: the file is missing, or its categories are not those of the data set.
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


def report(
    run: RunDirectory,
    config: Config,
    dataset: Dataset,
    result: dict[str, Any],
    truth: dict[str, Any],
    detections: list[dict[str, Any]],
    num_samples: int = 12,
) -> str:
    """The run's `report.html`."""
    history = read_history(run.history) if run.history.is_file() else []
    minutes = history[-1]["seconds"] / 60 if history else 0.0
    devices = choose_devices(config.run.devices)
    facts = {
        "steps": str(result["step"]),
        "training": f"{minutes:.1f} minutes on {len(devices)} x {devices[0].device_kind}",
        "evaluated on": f"{result['images']} images, {dataset.name} {result['split']}",
        "versions": f"ghm-jax {metadata.version('ghm-jax')}, jax {jax.__version__}",
    }
    return render_report(
        title=run.path.name,
        config=flatten(config),
        history=history,
        figures_of_merit={key: result[key] for key in METRICS},
        per_class=result["per_class"],
        samples=make_samples(dataset, truth, detections, num_samples),
        class_names=dataset.class_names,
        facts=facts,
    )


def make_samples(
    dataset: Dataset, truth: dict[str, Any], detections: list[dict[str, Any]], count: int
) -> list[Sample]:
    """The first images of the data set with their boxes and detections."""
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}

    def of_image(rows: list[dict[str, Any]], image_id: int) -> tuple[np.ndarray, np.ndarray]:
        rows = [row for row in rows if row["image_id"] == image_id]
        boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.array([label_of[row["category_id"]] for row in rows], np.int32)

    samples = []
    for i in range(min(count, len(dataset))):
        record = dataset.source[i]
        image_id = int(record["image/id"])
        boxes, labels = of_image(truth["annotations"], image_id)
        detected_boxes, detected_labels = of_image(detections, image_id)
        scores = [row["score"] for row in detections if row["image_id"] == image_id]
        samples.append(
            Sample(
                image_id=image_id,
                image=decode_image(record["image"]),
                boxes=boxes,
                labels=labels,
                detected_boxes=detected_boxes,
                detected_labels=detected_labels,
                detected_scores=np.array(scores, np.float32),
            )
        )
    return samples

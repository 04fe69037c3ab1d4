"""From a run to COCO figures and a report."""

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ghm_jax.analysis.gradient_stats import measure_gradients
from ghm_jax.config import Config, flatten
from ghm_jax.data.dataset import Dataset, open_dataset
from ghm_jax.distributed.devices import choose_devices, own_devices, replicate
from ghm_jax.distributed.processes import all_or_none, computed_once, is_first
from ghm_jax.evaluation.coco import (
    METRICS,
    Evaluator,
    load_ground_truth,
    load_results,
    match_images,
    score,
)
from ghm_jax.evaluation.detector import detect, restore_state
from ghm_jax.evaluation.error_analysis import error_analysis
from ghm_jax.evaluation.samples import make_samples
from ghm_jax.exceptions import ConfigError
from ghm_jax.plots.report import render_report
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.runs.history import read_history
from ghm_jax.runs.storage import unused_directory, write_text
from ghm_jax.training.state import TrainState

_SAMPLES = 12  # validation images drawn in the report
_STATS_IMAGES = 64  # for the histograms of the report; `ghm-jax stats` looks at more


def evaluate(
    run_dir: str | Path,
    *,
    split: str | None = None,
    annotations: str | None = None,
    evaluator: Evaluator = "hotcoco",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores the newest checkpoint of a run and writes its report.

    Where the official file lists images without annotations, as that of COCO's test-dev does,
    there is nothing to score: the detections go into a file for the evaluation server instead,
    named as it wants: `detections_test-dev2017_NAME_results.json` for the run NAME and the official
    file `image_info_test-dev2017.json`.

    Args:
        run_dir: of a run that has a checkpoint.
        split: TFDS split; None: the run's validation split.
        annotations: official COCO file of that split; None: the run's `data.annotations`.
        evaluator: hotcoco (fast) or pycocotools (the referee); the figures are the same.
        progress: who hears about it.

    Returns:
        What `metrics.json` holds: the twelve `METRICS`, `per_class` {class name: AP}, `step`,
        `split`, `images`, `evaluator` and `ground_truth`; or, of images without annotations,
        `step`, `split`, `images`, `ground_truth` and `submission`, the path of the file.

    Raises:
        ConfigError: no run, no checkpoint, no data, or annotations of another data set.
    """
    progress = progress if progress and is_first() else Silent()
    with all_or_none():
        run, config = load_run(run_dir)
        config, split = _choose_data(config, split, annotations)
        devices = choose_devices(config.run.devices)
        config.check(len(devices))
        dataset, truth = _open(config, split, run.path)
        state = restore_state(run, config, own_devices(devices)[0])
    progress.say(
        f"{run.path}: evaluating step {int(state.step)} on {len(dataset)} images of {dataset.name}"
    )
    variables = replicate(state.variables, devices)
    detections = detect(config, dataset, variables, devices, progress)
    progress.close()
    return computed_once(
        lambda: _write_results(
            run, config, split, dataset, truth, state, detections, evaluator, progress
        )
    )


def _write_results(
    run: RunDirectory,
    config: Config,
    split: str,
    dataset: Dataset,
    truth: dict[str, Any],
    state: TrainState,
    detections: list[dict[str, Any]],
    evaluator: Evaluator,
    progress: Progress,
) -> dict[str, Any]:
    """What `evaluate` writes, by one process on its own devices; returns what that does."""
    step, devices = int(state.step), own_devices(choose_devices(config.run.devices))
    facts = {
        "step": step,
        "split": split,
        "images": len(truth["images"]),
        "ground_truth": config.data.annotations or f"tfds:{dataset.name}",
    }
    if "annotations" not in truth:
        wanted = {image["id"] for image in truth["images"]}
        detections = [row for row in detections if row["image_id"] in wanted]
        path = run.path / submission_name(config.data.annotations, run.path.resolve().name)
        write_text(path, json.dumps(detections))
        return {**facts, "submission": str(path)}
    metrics, per_class = score(truth, detections, evaluator)
    result = {**metrics, "per_class": per_class, **facts, "evaluator": evaluator}
    write_text(run.detections, json.dumps(detections))
    write_text(run.metrics, json.dumps(result, indent=2) + "\n")
    errors = error_analysis(truth, detections)
    write_text(run.errors, json.dumps(errors, indent=2) + "\n")
    seen = measure_gradients(config, dataset, state, devices, _STATS_IMAGES, progress)
    progress.close()
    stats = {**seen, "step": step, "split": split}
    page = report(run, config, dataset, result, truth, detections, errors=errors, stats=stats)
    write_text(run.report, page)
    return result


def evaluate_file(
    source: str | Path,
    detections: str | Path,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    annotations: str | None = None,
    evaluator: Evaluator = "hotcoco",
) -> dict[str, Any]:
    """Scores detections that lie in a file, of whatever detector.

    Args:
        source: a run or an experiment (FILE or FILE:ROW): says which data.
        detections: JSON in COCO results form.
        out: a new or empty directory for `metrics.json`, `errors.json` and `report.html`, as of a
            run but for what needs the network; None: nothing is written.
        split, annotations, evaluator: as of `evaluate`.

    Returns:
        As `evaluate`, with `detections`, the file, in the place of `step`.

    Raises:
        ConfigError: no such file, run, experiment or data, detections of another data set, or `out`
            is in use.
    """
    config = load_run(source)[1] if Path(source).is_dir() else load_experiment(source)
    place = None if out is None else RunDirectory(unused_directory(out))
    config, split = _choose_data(config, split, annotations)
    dataset, truth = _open(config, split, source)
    if "annotations" not in truth:
        raise ConfigError(f"data.annotations: {config.data.annotations} has no annotations")
    rows = load_results(detections, truth)
    metrics, per_class = score(truth, rows, evaluator)
    result = {
        **metrics,
        "per_class": per_class,
        "detections": str(detections),
        "split": split,
        "images": len(truth["images"]),
        "ground_truth": config.data.annotations or f"tfds:{dataset.name}",
        "evaluator": evaluator,
    }
    if place is not None:
        errors = error_analysis(truth, rows)
        page = _file_report(config, dataset, result, truth, rows, errors)
        try:
            place.path.mkdir(parents=True, exist_ok=True)
            write_text(place.metrics, json.dumps(result, indent=2) + "\n")
            write_text(place.errors, json.dumps(errors, indent=2) + "\n")
            write_text(place.report, page)
        except OSError as error:
            raise ConfigError(f"--out: {out} cannot be written ({error.strerror})") from error
    return result


def _file_report(
    config: Config,
    dataset: Dataset,
    result: dict[str, Any],
    truth: dict[str, Any],
    detections: list[dict[str, Any]],
    errors: dict[str, Any],
) -> str:
    """`report.html` of detections alone: of the config only the data is theirs for certain."""
    data = flatten(config)
    return render_report(
        title=Path(result["detections"]).name,
        config={key: value for key, value in data.items() if key.startswith("data.")},
        history=[],
        figures_of_merit={key: result[key] for key in METRICS},
        per_class=result["per_class"],
        samples=make_samples(dataset, truth, detections, _SAMPLES),
        class_names=dataset.class_names,
        facts={"detections": str(len(detections)), **_facts(dataset, result)},
        errors=errors,
    )


def submission_name(annotations: str, name: str) -> str:
    """What COCO's evaluation server calls the results of detector `name` on an image list."""
    return f"detections_{Path(annotations).stem.removeprefix('image_info_')}_{name}_results.json"


def _choose_data(config: Config, split: str | None, annotations: str | None) -> tuple[Config, str]:
    """The config with these annotations, and the split."""
    chosen = config.data.annotations if annotations is None else annotations
    data = dataclasses.replace(config.data, annotations=chosen)
    return dataclasses.replace(config, data=data), split or data.validation_split


def _open(config: Config, split: str, source: str | Path) -> tuple[Dataset, dict[str, Any]]:
    """The split, and COCO instances of exactly its images (or the image list of a test set)."""
    dataset = open_dataset(config.data, split)
    if config.data.classes and dataset.class_names != config.data.classes:
        raise ConfigError(
            f"data.name: {dataset.name} has other classes than {source} was trained on; "
            "evaluate on a data set with the same class names"
        )
    truth = load_ground_truth(config, dataset)
    if config.data.annotations and "annotations" in truth:
        ids = [int(record["image/id"]) for record in dataset.source]
        truth = match_images(truth, ids, part="[" in split)
    return dataset, truth


def report(
    run: RunDirectory,
    config: Config,
    dataset: Dataset,
    result: dict[str, Any],
    truth: dict[str, Any],
    detections: list[dict[str, Any]],
    num_samples: int = _SAMPLES,
    errors: dict[str, Any] | None = None,
    stats: dict[str, Any] | None = None,
) -> str:
    """The run's `report.html`."""
    history = read_history(run.history) if run.history.is_file() else []
    minutes = history[-1]["seconds"] / 60 if history else 0.0
    devices = choose_devices(config.run.devices)
    facts = {
        "steps": str(result["step"]),
        "training": f"{minutes:.1f} minutes on {len(devices)} x {devices[0].device_kind}",
        **_facts(dataset, result),
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
        errors=errors,
        stats=stats,
    )


def _facts(dataset: Dataset, result: dict[str, Any]) -> dict[str, str]:
    return {
        "evaluated on": f"{result['images']} images, {dataset.name} {result['split']}",
        "versions": f"ghm-jax {metadata.version('ghm-jax')}, jax {jax.__version__}",
    }

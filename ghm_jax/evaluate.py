"""Evaluation of a run, or of detections in a file: COCO figures and a report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ghm_jax.analysis.gradient_stats import measure_gradients
from ghm_jax.config import Config
from ghm_jax.data.dataset import Dataset, open_dataset
from ghm_jax.distributed.devices import choose_devices, own_devices, replicate
from ghm_jax.distributed.processes import is_first, on_first_process, raise_together
from ghm_jax.evaluation.coco import (
    Evaluator,
    load_ground_truth,
    load_results,
    match_images,
    score,
)
from ghm_jax.evaluation.detector import Detector, detect, restore_state
from ghm_jax.evaluation.error_analysis import error_analysis
from ghm_jax.evaluation.results import Evaluation, Submission, report, write
from ghm_jax.exceptions import ArgumentError, ConfigError
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.storage import as_path, unused_directory, why_not_writable, write_text
from ghm_jax.training.state import TrainState

_STATS_IMAGES = 64  # for the histograms of the report; `ghm-jax stats` uses more


@dataclasses.dataclass(frozen=True)
class _Task:
    """What to evaluate on; all of it has been checked."""

    config: Config
    split: str
    dataset: Dataset
    truth: dict[str, Any]
    """COCO instances of exactly these images; without annotations for a test set."""

    def score(
        self, detections: list[dict[str, Any]], evaluator: Evaluator, **source: Any
    ) -> Evaluation:
        """The evaluation of detections; `source` is its `step` or `file`."""
        metrics, per_class = score(self.truth, detections, evaluator)
        return Evaluation(
            metrics=metrics,
            per_class=per_class,
            split=self.split,
            images=len(self.truth["images"]),
            ground_truth=self.config.data.annotations or f"tfds:{self.dataset.name}",
            evaluator=evaluator,
            detections=detections,
            errors=error_analysis(self.truth, detections),
            **source,
        )


def evaluate(
    run_dir: str | Path,
    *,
    split: str | None = None,
    annotations: str | None = None,
    data_dir: str | None = None,
    evaluator: Evaluator = "hotcoco",
    progress: Progress | None = None,
) -> Evaluation | Submission:
    """Scores the newest checkpoint of a run and writes its report.

    If the official file lists images without annotations, as that of COCO's test-dev does, there
    is nothing to score: the detections are written to a file for the evaluation server, under the
    name that it requires: `detections_test-dev2017_NAME_results.json` for the run NAME and the
    official file `image_info_test-dev2017.json`.

    Args:
        run_dir: of a run that has a checkpoint.
        split: TFDS split; None: the run's validation split.
        annotations: official COCO file of that split; None: the run's `data.annotations`.
        data_dir: where the data is now; None: the run's `data.dir`.
        evaluator: hotcoco (fast) or pycocotools (the reference); the figures are the same.
        progress: receives progress updates.

    Returns:
        The result, also written to the run's directory: metrics.json, detections.json, errors.json,
        report.html; if that fails, `unwritten` says why. For images without annotations, the
        file for the server.

    Raises:
        UserError: no run, no checkpoint, no data, annotations of another data set, or the file for
            the server cannot be written.
    """
    progress = progress if progress and is_first() else Silent()
    with raise_together():
        run, config = load_run(run_dir, data_dir=data_dir)
        devices = choose_devices(config.run.devices)
        config.check(len(devices))
        task = _open(config, split, annotations, run.path, progress)
        _check_writable(run, task, progress)
        state = restore_state(run, config, own_devices(devices)[0])
    progress.say(
        f"{run.path}: evaluating step {int(state.step)} on {len(task.dataset)} images of "
        f"{task.dataset.name}"
    )
    variables = replicate(state.variables, devices)
    detector = Detector(config, len(task.dataset.class_names), devices)
    detections = detect(detector, task.config, task.dataset, variables, progress)
    progress.close()
    if "annotations" not in task.truth:
        path = on_first_process(lambda: str(_write_submission(run, task, detections)))
        return Submission(path=as_path(path), images=len(task.truth["images"]))
    found = on_first_process(
        lambda: dataclasses.asdict(_write(run, task, state, detections, evaluator, progress))
    )
    return Evaluation(**found)


def _write(
    run: RunDirectory,
    task: _Task,
    state: TrainState,
    detections: list[dict[str, Any]],
    evaluator: Evaluator,
    progress: Progress,
) -> Evaluation:
    """Scores, measures the gradients and writes; in one process, on its own devices."""
    evaluation = task.score(detections, evaluator, step=int(state.step))
    devices = own_devices(choose_devices(task.config.run.devices))
    stats = measure_gradients(task.config, task.dataset, state, devices, _STATS_IMAGES, progress)
    progress.close()
    stats = {**stats, "step": evaluation.step, "split": task.split}
    page = report(evaluation, task.config, task.dataset, task.truth, run=run, stats=stats)
    try:
        write(evaluation, run, page)
    except OSError as error:
        return dataclasses.replace(evaluation, unwritten=f"{error.filename}: {error.strerror}")
    return evaluation


def _check_writable(run: RunDirectory, task: _Task, progress: Progress) -> None:
    """Says that nothing can be written, before the work. A file for the server is all that there is
    to gain, so without it there is an error; figures are there to be read all the same."""
    if not is_first():
        return
    if "annotations" not in task.truth:
        if why := why_not_writable(_submission_path(run, task)):
            raise ConfigError(str(run.path), f"cannot be written ({why})")
    elif why := why_not_writable(run.detections, run.metrics, run.errors, run.report):
        progress.say(f"warning: {run.path}: cannot be written ({why}); only figures are shown")


def _submission_path(run: RunDirectory, task: _Task) -> Path:
    return run.path / submission_name(task.config.data.annotations, run.path.resolve().name)


def _write_submission(run: RunDirectory, task: _Task, detections: list[dict[str, Any]]) -> Path:
    listed = {image["id"] for image in task.truth["images"]}
    path = _submission_path(run, task)
    write_text(path, json.dumps([row for row in detections if row["image_id"] in listed]))
    return path


def submission_name(annotations: str, name: str) -> str:
    """The file name that COCO's evaluation server requires for detector `name` on an image list."""
    return f"detections_{Path(annotations).stem.removeprefix('image_info_')}_{name}_results.json"


def evaluate_file(
    source: str | Path,
    detections: str | Path,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    annotations: str | None = None,
    data_dir: str | None = None,
    evaluator: Evaluator = "hotcoco",
) -> Evaluation:
    """Scores detections in a file, from any detector.

    Args:
        source: a run or an experiment (FILE or FILE:ROW), for its data settings.
        detections: JSON in COCO results form.
        out: a new or empty directory for metrics.json, errors.json and report.html, as for a run
            but without what needs the network; None: nothing is written.
        split, annotations, data_dir, evaluator: as for `evaluate`.

    Raises:
        UserError: no such file, run, experiment or data, detections of another data set, or `out`
            is in use or cannot be written.
    """
    config = load_run(source)[1] if as_path(source).is_dir() else load_experiment(source)
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    place = None if out is None else RunDirectory(unused_directory(out))
    if place is not None and (why := why_not_writable(place.metrics)):
        raise ArgumentError("out", f"{out} cannot be written ({why})", "choose another directory")
    task = _open(config, split, annotations, source, Silent())
    if "annotations" not in task.truth:
        raise ConfigError("data.annotations", f"{task.config.data.annotations} has no annotations")
    rows = load_results(detections, task.truth)
    evaluation = task.score(rows, evaluator, file=str(detections))
    if place is not None:
        page = report(evaluation, task.config, task.dataset, task.truth)
        try:
            place.path.mkdir(parents=True, exist_ok=True)
            write(evaluation, place, page)
        except OSError as error:
            raise ArgumentError("out", f"{out} cannot be written ({error.strerror})") from error
    return evaluation


def _open(
    config: Config,
    split: str | None,
    annotations: str | None,
    source: str | Path,
    progress: Progress,
) -> _Task:
    """The data to evaluate on, with COCO instances of exactly its images (or, of a test set, the
    list of its images)."""
    chosen = config.data.annotations if annotations is None else annotations
    data = dataclasses.replace(config.data, annotations=chosen)
    config, split = dataclasses.replace(config, data=data), split or data.validation_split
    dataset = open_dataset(data, split, progress)
    if data.classes and dataset.class_names != data.classes:
        raise ConfigError(
            "data.name",
            f"{dataset.name} has other classes than {source} was trained on",
            "evaluate on a data set with the same class names",
        )
    truth = load_ground_truth(config, dataset)
    if data.annotations and "annotations" in truth:
        ids = [int(record["image/id"]) for record in dataset.source]
        truth = match_images(truth, ids, part="[" in split)
    return _Task(config, split, dataset, truth)

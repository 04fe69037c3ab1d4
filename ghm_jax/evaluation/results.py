"""The result of an evaluation, and the files it is written to."""

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ghm_jax.config import Config, flatten
from ghm_jax.data.dataset import Dataset
from ghm_jax.distributed.devices import choose_devices
from ghm_jax.evaluation.coco import METRICS
from ghm_jax.evaluation.samples import make_samples
from ghm_jax.plots.report import render_report
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.runs.history import read_history
from ghm_jax.storage import write_text

_SAMPLES = 12  # validation images drawn in the report


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The score of some detections, of a run or of a file."""

    metrics: dict[str, float]
    """The twelve COCO figures by name, fractions of 1; -1: there is no such object."""
    per_class: dict[str, float]
    """AP by class name."""
    split: str
    """TFDS split of the data set."""
    images: int
    """How many were evaluated."""
    ground_truth: str
    """The official file, or `tfds:` and the name of the data set."""
    evaluator: str
    """hotcoco or pycocotools."""
    detections: list[dict[str, Any]]
    """COCO results."""
    errors: dict[str, Any]
    """See `ghm_jax.evaluation.error_analysis`."""
    step: int | None = None
    """Of the checkpoint; None: detections of a file."""
    file: str | None = None
    """The detections were read from it; None: of a checkpoint."""
    unwritten: str = ""
    """Why the files could not be written; empty: they were, or were not asked for."""

    def summary(self) -> dict[str, Any]:
        """What metrics.json holds."""
        source = {"detections": self.file} if self.step is None else {"step": self.step}
        return {
            **self.metrics,
            "per_class": self.per_class,
            **source,
            "split": self.split,
            "images": self.images,
            "ground_truth": self.ground_truth,
            "evaluator": self.evaluator,
        }


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A results file for COCO's evaluation server, of images without annotations."""

    path: Path
    images: int


def write(evaluation: Evaluation, run: RunDirectory, page: str) -> None:
    """Writes metrics.json, errors.json and report.html, and of a run its detections.json.

    Args:
        evaluation: what to write.
        run: the directory, which must exist.
        page: from `report`.
    """
    if evaluation.step is not None:
        write_text(run.detections, json.dumps(evaluation.detections))
    write_text(run.metrics, json.dumps(evaluation.summary(), indent=2) + "\n")
    write_text(run.errors, json.dumps(evaluation.errors, indent=2) + "\n")
    write_text(run.report, page)


def report(
    evaluation: Evaluation,
    config: Config,
    dataset: Dataset,
    truth: dict[str, Any],
    *,
    run: RunDirectory | None = None,
    stats: dict[str, Any] | None = None,
) -> str:
    """The page `report.html`.

    Args:
        evaluation: what to show.
        config: of the run. For detections from a file only its data settings are certain to apply,
            and only these are shown.
        dataset: that was evaluated.
        truth: COCO instances.
        run: the run; None: detections of a file.
        stats: see `ghm_jax.analysis.gradient_stats`; None: no network.
    """
    settings, history = flatten(config), []
    if run is None:
        settings = {key: value for key, value in settings.items() if key.startswith("data.")}
        facts = {"detections": str(len(evaluation.detections))}
    else:
        history = read_history(run.history) if run.history.is_file() else []
        minutes = (history[-1].get("seconds") or 0.0) / 60 if history else 0.0
        devices = choose_devices(config.run.devices)
        facts = {
            "steps": str(evaluation.step),
            "training": f"{minutes:.1f} minutes on {len(devices)} x {devices[0].device_kind}",
        }
    versions = f"ghm-jax {metadata.version('ghm-jax')}, jax {jax.__version__}"
    evaluated = f"{evaluation.images} images, {dataset.name} {evaluation.split}"
    return render_report(
        title=Path(evaluation.file or "").name if run is None else run.path.name,
        config=settings,
        history=history,
        figures_of_merit={key: evaluation.metrics[key] for key in METRICS},
        per_class=evaluation.per_class,
        samples=make_samples(dataset, truth, evaluation.detections, _SAMPLES),
        class_names=dataset.class_names,
        facts={**facts, "evaluated on": evaluated, "versions": versions},
        errors=evaluation.errors,
        stats=stats,
    )

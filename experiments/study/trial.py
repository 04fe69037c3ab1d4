"""One run of the study in a process of its own: trains, evaluates, prints one line of JSON.

python -m experiments.study.trial CONFIG.json RUN_DIR [--core 0]
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def main(
    config: tyro.conf.Positional[Path], run_dir: tyro.conf.Positional[Path], core: int = -1
) -> None:
    """Trains and evaluates; the directory of the run is removed at the end.

    Args:
        config: JSON file, as `ghm_jax.config.to_dict` has it.
        run_dir: where a run that was stopped is resumed.
        core: the only CPU core to use; -1: all.
    """
    if core >= 0:
        os.sched_setaffinity(0, {core})  # before JAX starts its threads
    from ghm_jax.config import from_dict
    from ghm_jax.distributed.devices import keep_programs
    from ghm_jax.runs.records import provenance
    from ghm_jax.storage import cache_directory
    from ghm_jax.train import train
    from ghm_jax.training.log import TrainingDiverged

    keep_programs(cache_directory("programs"))  # runs that differ by seed or data share theirs
    settings = from_dict(json.loads(config.read_text()))
    start = time.process_time()  # as the run may be paused, or share its core
    try:
        train(settings, run_dir)
        found = figures(settings, run_dir)
    except TrainingDiverged as error:
        found = {"metrics": dict.fromkeys(METRICS, 0.0), "diverged": str(error)}
    seconds = round(time.process_time() - start)
    origin = provenance("python -m experiments.study", ("jax",))
    print(json.dumps({"seconds": seconds, **found, **origin}), flush=True)
    shutil.rmtree(run_dir)


def figures(config: Any, run_dir: Path) -> dict[str, Any]:
    """COCO figures of a trained run, AP by IoU, and how well its scores are calibrated."""
    from ghm_jax.data import coco_ground_truth, open_dataset
    from ghm_jax.evaluate import evaluate
    from ghm_jax.evaluation.results import Evaluation

    evaluation = evaluate(run_dir)
    assert isinstance(evaluation, Evaluation)  # the validation split is annotated
    errors = json.loads((run_dir / "errors.json").read_text())
    calibration = errors["calibration"] or {"ece": None, "bins": []}  # None: no detections
    truth = coco_ground_truth(open_dataset(config.data, config.data.validation_split))
    return {
        "metrics": {key: evaluation.metrics[key] for key in METRICS},
        "ap_by_iou": ap_by_iou(truth, evaluation.detections),
        "ece": calibration["ece"],
        "reliability": [
            {key: each[key] for key in ("score", "precision", "count")}
            for each in calibration["bins"]
        ],
    }


def ap_by_iou(truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """AP at each IoU from 0.50 to 0.95, all areas and 100 detections."""
    from ghm_jax.evaluation.coco import precision_of

    _, precision = precision_of(truth, detections)
    return {
        f"{0.5 + 0.05 * i:.2f}": float(values[values > -1].mean())
        for i, values in enumerate(precision)
    }


if __name__ == "__main__":
    tyro.cli(main)

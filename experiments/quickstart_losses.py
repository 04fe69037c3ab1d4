"""The quickstart with three classification losses and several seeds; GHM-R for the boxes in all.

    python experiments/quickstart_losses.py [--losses focal ...] [--seeds 0 1 2] [--devices 1]
    python experiments/quickstart_losses.py --losses focal cross_entropy floored --steps 800
        --devices 1 --runs runs/calibration
        --result experiments/results/calibration_800_steps.json

focal: focal loss (0.25, 2). published: GHM-C without the floor, the published weighting with one
histogram for all levels. floored: the quickstart itself. Nine runs of a few minutes on two cores;
finished runs are skipped, and the result in experiments/results/quickstart_losses.json has all
finished runs. `make tables` shows it in docs/results.md.

The other names are the alternatives to the defaults of the losses: published_levels is the
published code, with one call per pyramid level; printed divides by the number of all bins, as in
the paper, with the floor; uncorrected starts the moving average at zero, with the floor; softened
has strength 0.75 instead of a floor.

The second command measures calibration: expected calibration error, the mean distance between
score and precision (at IoU 0.5) in ten bins of score, over all detections above the threshold of
0.05 and over those with a score of at least 0.3. The same for two full runs is in
experiments/results/calibration.json.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from ghm_jax.config import REFERENCE, Config
from ghm_jax.distributed.devices import use_cpu_cores
from ghm_jax.evaluate import evaluate
from ghm_jax.progress import Bar
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.runs.records import write_record
from ghm_jax.train import train

LOSSES: dict[str, dict[str, Any]] = {
    "focal": {"classification": "focal"},
    "cross_entropy": {"classification": "cross_entropy"},
    "published": {"ghm_c": {"min_count": 0.0}},
    "floored": {},
    "published_levels": {"ghm_c": REFERENCE, "ghm_r": REFERENCE, "ghm_scope": "level"},
    "printed": {"ghm_c": {"normalizer": "bins"}, "ghm_r": {"normalizer": "bins"}},
    "uncorrected": {"ghm_c": {"bias_correction": False}, "ghm_r": {"bias_correction": False}},
    "softened": {"ghm_c": {"min_count": 0.0, "strength": 0.75}},
}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "AR100")
FIGURES = (*METRICS, "ECE", "ECE_03", "overconfidence", "detections")
RESULT = Path(__file__).parent / "results" / "quickstart_losses.json"


def variant(base: Config, name: str, seed: int, devices: int) -> Config:
    """The quickstart's config with another classification loss and seed."""
    changes = LOSSES[name] | {
        ghm: dataclasses.replace(getattr(base.loss, ghm), **LOSSES[name].get(ghm, {}))
        for ghm in ("ghm_c", "ghm_r")
    }
    return dataclasses.replace(
        base,
        seed=seed,
        loss=dataclasses.replace(base.loss, **changes),
        run=dataclasses.replace(base.run, devices=devices),
    )


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    losses: tuple[str, ...] = ("focal", "published", "floored"),
    devices: int = 0,
    runs: str = "runs/quickstart_losses",
    result: Path = RESULT,
    steps: int = 0,
) -> None:
    """Trains and scores the runs that are not finished, and writes the table.

    Args:
        seeds: of the runs.
        losses: names of `LOSSES`.
        devices: for each run; 0: all.
        runs: directory for the runs.
        result: JSON file for the table.
        steps: of each run; 0: the quickstart's.
    """
    base = load_experiment(Path(__file__).parent / "quickstart.py")
    optimizer = dataclasses.replace(base.optimizer, steps=steps or base.optimizer.steps)
    base = dataclasses.replace(base, optimizer=optimizer)
    use_cpu_cores((base.optimizer.batch_size, base.predict.batch_size))
    for seed in seeds:
        for name in losses:
            run_dir = Path(runs) / f"{name}-{seed}"
            if not (run_dir / "metrics.json").is_file():
                train(variant(base, name, seed, devices), run_dir, progress=Bar())
                evaluate(run_dir)
    write_result(Path(runs), result, base.optimizer.steps)


def calibration(run_dir: Path) -> dict[str, Any]:
    """How well the scores of a run are calibrated, with the bins."""
    bins = json.loads((run_dir / "errors.json").read_text())["calibration"]["bins"]

    def mean(distance: Callable[[float], float], bins: list[dict[str, float]]) -> float:
        total = sum(each["count"] for each in bins)
        return (
            sum(each["count"] * distance(each["score"] - each["precision"]) for each in bins)
            / total
        )

    confident = [each for each in bins if each["score_from"] > 0.25]
    return {
        "ECE": mean(abs, bins),
        "ECE_03": mean(abs, confident),
        "overconfidence": mean(float, confident),  # score minus precision, from 0.3 on
        "detections": sum(each["count"] for each in bins),
        "bins": bins,
    }


def write_result(runs: Path, result: Path, steps: int) -> None:
    """Collects the metrics of all finished runs."""
    rows = []
    for path in sorted(runs.glob("*/metrics.json")):
        name, seed = path.parent.name.rsplit("-", 1)
        figures = json.loads(path.read_text())
        figures = {key: figures[key] for key in METRICS} | calibration(path.parent)
        rows.append({"loss": name, "seed": int(seed), **figures})
    summary = {}
    for name in LOSSES:
        of_loss = [row for row in rows if row["loss"] == name]
        if not of_loss:
            continue
        summary[name] = {
            key: {
                "mean": statistics.mean(row[key] for row in of_loss),
                "min": min(row[key] for row in of_loss),
                "max": max(row[key] for row in of_loss),
            }
            for key in FIGURES
        }
    command = "python experiments/quickstart_losses.py " + " ".join(sys.argv[1:])
    device = f"{os.cpu_count()} cores, {jax.devices()[0].device_kind} {platform.machine()}"
    contents = {"steps": steps, "summary": summary, "runs": rows}
    write_record(result, command, contents, packages=("jax",), device=device)


if __name__ == "__main__":
    tyro.cli(main)

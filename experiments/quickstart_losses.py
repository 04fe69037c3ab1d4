"""The quickstart with three classification losses and several seeds; GHM-R for the boxes in all.

    python experiments/quickstart_losses.py [--seeds 3] [--out experiments/results/FILE.json]

focal: focal loss (0.25, 2). published: GHM-C as in the published code but with one histogram for
all levels, momentum 0.75, no floor. floored: the quickstart itself. Nine runs of a few minutes on
two cores; finished ones are not run again. The result goes into the README.
"""

import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import tyro

from ghm_jax.config import Config
from ghm_jax.parallel import use_cpu_cores
from ghm_jax.progress import Bar
from ghm_jax.rundir import load_experiment

LOSSES = {
    "focal": {"classification": "focal"},
    "published": {"min_count": 0.0},
    "floored": {},
}


def variant(base: Config, name: str, seed: int) -> Config:
    """The quickstart's config with another classification loss and seed."""
    return dataclasses.replace(base, seed=seed, loss=dataclasses.replace(base.loss, **LOSSES[name]))


def main(
    seeds: int = 3,
    runs: str = "runs/quickstart_losses",
    out: str = "experiments/results/quickstart_losses.json",
) -> None:
    base = load_experiment(Path(__file__).parent / "quickstart.py")
    use_cpu_cores((base.optimizer.batch_size, base.predict.batch_size))

    from ghm_jax.evaluate import evaluate
    from ghm_jax.train import train

    results = []
    for seed in range(seeds):
        for name in LOSSES:
            run_dir = f"{runs}/{name}-{seed}"
            train(variant(base, name, seed), run_dir, progress=Bar())
            figures = evaluate(run_dir)
            figures = {k: figures[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "AR100")}
            results.append({"loss": name, "seed": seed, **figures})
            print(results[-1], flush=True)
    summary = {
        name: {
            key: {
                "mean": statistics.mean(r[key] for r in results if r["loss"] == name),
                "stdev": statistics.stdev(r[key] for r in results if r["loss"] == name),
            }
            for key in ("AP", "AP50", "AR100")
        }
        for name in LOSSES
    }
    record = {
        "command": f"python {' '.join(sys.argv)}",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind} ({platform.machine()})",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "steps": base.optimizer.steps,
        "runs": results,
        "summary": summary,
    }
    Path(out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

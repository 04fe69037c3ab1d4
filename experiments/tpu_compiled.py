"""What every COCO recipe needs on the TPU slices it is meant for, from the compiler alone.

    pip install "jax[tpu]"        # x86-64 Linux; no TPU is needed
    python -m experiments.tpu_compiled [--recipes coco_r50_ghm] [--topologies v5e:2x2]

Each program takes minutes to compile on a few cores. Finished ones are kept in
experiments/results/tpu_compiled.json and not compiled again.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import tyro

from ghm_jax.analysis.compiled import ENVIRONMENT, CompiledStep, compile_for, find_slice
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.runs.records import write_record

RESULT = Path(__file__).parent / "results" / "tpu_compiled.json"
RECIPES = (
    "coco_r50_ghm",
    "coco_r101_ghm",
    "coco_x101_32x4d_ghm",
    "coco_x101_64x4d_ghm",
    "coco_r50_torchvision",
    "coco_r50_torchvision_v2",
)
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4", "v5e:16x16")
SIZE = (800, 1344)
CLASSES = 80


def main(
    recipes: tuple[str, ...] = RECIPES,
    topologies: tuple[str, ...] = TOPOLOGIES,
    program: str = "train",
) -> None:
    """Compiles what is not there yet, and writes the table after each program."""
    os.environ.update({**ENVIRONMENT, **os.environ})  # what the user set wins
    jax.config.update("jax_platforms", "cpu")
    rows: dict[str, Any] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    for topology in topologies:
        for recipe in recipes:
            key = f"{recipe} {program} {topology}"
            if key in rows:
                continue
            step = compile_recipe(recipe, topology, program)
            rows[key] = step.as_record()
            write_record(
                RESULT,
                "python -m experiments.tpu_compiled",
                {"rows": rows},
                packages=("jax", "jaxlib", "libtpu"),
                device="compiled for the TPU slices named, not run",
            )
            print(
                f"{key}: {step.memory.peak / 2**30:.1f} of {step.memory.chip / 2**30:.0f} GiB, "
                f"at least {1e3 * step.bound:.1f} ms, compiled in {step.compile_seconds:.0f} s",
                flush=True,
            )


def compile_recipe(recipe: str, topology: str, program: Any) -> CompiledStep:
    """A recipe at its own batch size, or with one image per chip where there are more chips."""
    config = load_experiment(str(Path(__file__).parent / f"{recipe}.py"))
    target = find_slice(topology)
    batch = max(1, config.optimizer.batch_size // len(target.devices))
    return compile_for(config, CLASSES, SIZE, target, program=program, batch_per_chip=batch)


if __name__ == "__main__":
    tyro.cli(main)

"""Losses, matching and network on this machine's accelerator against float64 and its CPU.

    python -m experiments.numerics

The losses are compared with NumPy in float64, written out here; targets and network with the same
program on the CPU, which the tests compare with other libraries.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from ghm_jax.bench.losses import make_inputs
from ghm_jax.bench.train import TrainCase, random_batch
from ghm_jax.detection.outputs import loss_inputs
from ghm_jax.distributed.devices import jit_init
from ghm_jax.losses import IGNORE, cross_entropy_loss, ghm_c_loss
from ghm_jax.runs.records import write_record
from ghm_jax.training.build import build

BINS = 30
RESULT = Path(__file__).parent / "results" / "numerics.json"


def main(small: bool = False, out: Path = RESULT) -> None:
    """Prints the deviations and writes them as JSON."""
    rows = {**of_losses(2_000 if small else 200_000), **of_network(small)}
    for name, value in rows.items():
        print(f"{name:<48}{value:>12.2e}")
    write_record(out, "python -m experiments.numerics", {"rows": rows}, packages=("jax", "jaxlib"))


def of_losses(anchors: int) -> dict[str, float]:
    """Relative deviation of values and gradients from float64."""
    inputs = make_inputs(anchors)
    x, classes = inputs.logits.astype(np.float64), inputs.classes[:, None]
    target = (classes == np.arange(x.shape[1])).astype(np.float64)
    used = np.broadcast_to(classes != IGNORE, x.shape)
    probability = 1 / (1 + np.exp(-x))
    norm = np.abs(probability - target)
    terms = np.logaddexp(0, x) - x * target
    # In float32, as the losses do: an example near an edge may lie in another bin.
    bin_of = np.minimum((norm.astype(np.float32) * np.float32(BINS)).astype(int), BINS - 1)
    counts = np.bincount(bin_of[used], minlength=BINS).astype(np.float64)
    weights = used.sum() / (np.maximum(counts, 1) * (counts > 0).sum())
    weight = {"GHM-C": weights[bin_of] * used, "cross-entropy": used * 1.0}
    found = {
        "GHM-C": jax.value_and_grad(lambda *inputs: ghm_c_loss(*inputs, min_count=0)[0]),
        "cross-entropy": jax.value_and_grad(lambda *inputs: cross_entropy_loss(*inputs)[0]),
    }
    rows = {}
    for name, function in found.items():
        value, gradient = jax.jit(function)(inputs.logits, inputs.classes)
        expected = (weight[name] * terms).sum() / used.sum()
        slope = weight[name] * (probability - target) / used.sum()
        rows[f"{name}, value against float64"] = abs(float(value) / expected - 1)
        rows[f"{name}, gradient against float64"] = _distance(gradient, slope)
    return rows


def of_network(small: bool) -> dict[str, float]:
    """Deviation of the accelerator from the CPU, in float32 and in bfloat16."""
    case = TrainCase(
        backbone="resnet10" if small else "resnet50",
        padded_size=(64, 64) if small else (256, 256),
        channels=16 if small else 256,
        batch_size=2,
        dtype="float32",
    )
    batch, rows = random_batch(case), dict[str, float]()
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    expected = _loss_inputs(case, batch, cpu)
    for dtype in ("float32", "bfloat16"):
        found = _loss_inputs(dataclasses.replace(case, dtype=dtype), batch, device)
        rows[f"logits in {dtype} against the CPU in float32"] = _distance(found[0], expected[0])
        rows[f"box deltas in {dtype} against the CPU in float32"] = _distance(found[1], expected[1])
        if dtype == "float32":
            other = np.asarray(found[2].classes) != np.asarray(expected[2].classes)
            rows["share of anchors with another target"] = float(other.mean())
    return rows


def _loss_inputs(case: TrainCase, batch: Any, device: Any) -> Any:
    trainer = build(case.config, case.num_classes)
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        state = jit_init(trainer.init_state, device)()

        @jax.jit
        def outputs(variables: Any, batch: Any) -> Any:
            return loss_inputs(variables, batch, config=case.config, model=trainer.model)

        return jax.device_get(outputs(state.variables, batch))


def _distance(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|, over all elements."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    tyro.cli(main)

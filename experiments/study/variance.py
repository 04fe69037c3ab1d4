"""Why a floor helps: the noise of the gradient by bin, and where scores come to rest.

    python -m experiments.study.variance --data-dir data

Trains the quickstart, with the published `mu`, with and without the floor for `--steps` each. At
each of the two states, fixed, training batches go through both forms of GHM-C:

* Noise. The gradient of the class head's parameters that comes from the examples of one bin, for
  each bin; its variance over the batches, and the square of its mean. A bin of c examples has the
  weight N / (M c), so that the variance of its sum should fall as 1 / c.
* Rest. Of all examples with the score p, a share q is positive. With the density D, their gradients
  cancel where q (1 - p) / D(1 - p) = (1 - q) p / D(p). The measured share is compared with the q of
  this equation, by bin of score.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.study.plan import FLOOR, NO_FLOOR, Entry, Trial
from ghm_jax.batch import Batch
from ghm_jax.config import Config
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import train_batches
from ghm_jax.detection.outputs import loss_inputs
from ghm_jax.distributed.devices import jit_init
from ghm_jax.losses import IGNORE
from ghm_jax.runs.records import write_record
from ghm_jax.training.build import Trainer, build
from ghm_jax.training.state import TrainState

RESULT = Path(__file__).parents[1] / "results" / "study" / "variance.json"
BINS = 30
FLOORS = {"no floor": 0.0, "floor 100": 100.0}


class Measured(NamedTuple):
    """Of one batch."""

    counts: jax.Array
    """f32[bins], examples."""
    positive: jax.Array
    """f32[bins], of these the positive ones."""
    gradients: jax.Array
    """f32[bins, parameters of the class head], sums over the examples of a bin, without weights."""


def main(
    data_dir: str = "data",
    steps: int = 1200,
    batches: int = 64,
    seed: int = 0,
    out: Path = RESULT,
) -> None:
    """Trains twice, measures, and writes both."""
    rows = []
    for entry in (NO_FLOOR, FLOOR):
        config = config_of(entry, data_dir, steps, seed)
        trainer, state = trained(config)
        measured = measure(trainer, state, batches)
        rows.append({"trained with": entry.name, **noise(measured), **rest(measured)})
    command = f"python -m experiments.study.variance --steps {steps} --batches {batches}"
    contents = {"rows": rows, "steps": steps, "batches": batches, "seed": seed}
    write_record(out, command, contents, packages=("jax",))


def config_of(entry: Entry, data_dir: str, steps: int, seed: int) -> Config:
    """The quickstart with a loss of the study."""
    return Trial(entry, "quickstart", "digit_scenes", seed, 1.0, 1.0, steps).config(data_dir)


def trained(config: Config) -> tuple[Trainer, TrainState]:
    """The state after all steps."""
    dataset = open_dataset(config.data, config.data.train_split)
    trainer = build(config, len(dataset.class_names))
    state = jit_init(trainer.init_state, jax.devices()[0])()
    step = jax.jit(trainer.step, donate_argnums=0)
    with contextlib.closing(train_batches(dataset, config, 0)) as loaded:
        for _ in range(config.optimizer.steps):
            state, _ = step(state, next(loaded).batch)
    return trainer, state


def measure(trainer: Trainer, state: TrainState, batches: int) -> list[Measured]:
    """Training batches at a fixed state."""
    config = trainer.config
    dataset = open_dataset(config.data, config.data.train_split)
    measure_batch = jax.jit(lambda variables, batch: by_bin(trainer, variables, batch))
    with contextlib.closing(train_batches(dataset, config, config.optimizer.steps)) as loaded:
        found = [measure_batch(state.variables, next(loaded).batch) for _ in range(batches)]
    return jax.device_get(found)


def by_bin(trainer: Trainer, variables: dict[str, Any], batch: Batch) -> Measured:
    """Examples and their gradients by bin of gradient norm."""
    params = variables["params"]

    def logits_of(head: Any) -> tuple[jax.Array, jax.Array]:
        changed = {**variables, "params": {**params, "class_head": head}}
        logits, _, targets = loss_inputs(changed, batch, config=trainer.config, model=trainer.model)
        return logits, targets.classes

    logits, pullback, classes = jax.vjp(logits_of, params["class_head"], has_aux=True)
    targets = jax.nn.one_hot(classes, logits.shape[-1])
    error = jnp.where((classes != IGNORE)[..., None], jax.nn.sigmoid(logits) - targets, jnp.nan)
    bins = jnp.clip((jnp.abs(error) * BINS).astype(jnp.int32), 0, BINS - 1)

    def of_bin(number: jax.Array) -> Measured:
        inside = (bins == number) & jnp.isfinite(error)
        (gradient,) = pullback(jnp.where(inside, error, 0.0))
        flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])
        return Measured(inside.sum().astype(jnp.float32), (inside * targets).sum(), flat)

    return jax.lax.map(of_bin, jnp.arange(BINS))


def noise(measured: Sequence[Measured]) -> dict[str, Any]:
    """Variance over the batches of each bin's weighted gradient, and the square of its mean."""
    counts = np.stack([x.counts for x in measured]).astype(np.float64)
    sums = np.stack([x.gradients for x in measured]).astype(np.float64)
    found: dict[str, Any] = {"counts": counts.mean(0).tolist()}
    for name, floor in FLOORS.items():
        density = np.maximum(counts, floor)
        inverse = np.divide(1.0, density, out=np.zeros_like(density), where=counts > 0)
        weights = inverse / (counts * inverse).sum(1, keepdims=True)
        gradients = weights[..., None] * sums
        found[name] = {
            "variance": gradients.var(0, ddof=1).sum(-1).tolist(),
            "mean_squared": (gradients.mean(0) ** 2).sum(-1).tolist(),
        }
    return found


def rest(measured: Sequence[Measured]) -> dict[str, Any]:
    """Share of positive examples by score, measured and from the densities."""
    counts, positive = (
        np.stack(values).astype(np.float64).sum(0)
        for values in ([x.counts for x in measured], [x.positive for x in measured])
    )
    negative, of_score = counts - positive, positive[::-1]
    seen = of_score / np.maximum(of_score + negative, 1.0)
    score = (np.arange(BINS) + 0.5) / BINS
    predicted = {}
    for name, floor in FLOORS.items():
        density = np.maximum(counts, floor * len(measured))
        odds = score / (1 - score) * density[::-1] / np.maximum(density, 1.0)
        predicted[name] = (odds / (1 + odds)).tolist()
    return {"score": score.tolist(), "positive": seen.tolist(), "at_rest": predicted}


if __name__ == "__main__":
    tyro.cli(main)

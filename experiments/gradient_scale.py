"""How much larger the gradient of the published losses is than that of one histogram.

    ghm-jax data prepare folder --name coco --out data --train IMAGES JSON --validation IMAGES JSON
    python -m experiments.gradient_scale --data-dir data --steps 0
    python -m experiments.gradient_scale --data-dir data --backbone resnet10 --channels 64
        --steps 0 50
    python -m experiments.gradient_scale --data-dir data --backbone resnet10 --channels 64
        --size 400 672 --steps 50 300

Trains the recipe of coco_r50_ghm.py from random weights, with group normalization, as there are no
ImageNet weights for every backbone. At each of `--steps` the same batches go through both forms of
both losses: a call for each pyramid level as published, and one histogram for all levels with a
floor of 10 examples in a batch of 2 images, about the default of 100 in one of 16. Each form has
its own moving histogram, filled by `WARM_UP` batches.
Ratios are between norms of the gradient of all parameters, for loss weights of 1. The result in
experiments/results/gradient_scale.json holds the rows of all networks; docs/losses.md shows it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from ghm_jax.batch import Batch
from ghm_jax.config import Config, Harmonizing, Loss, Model
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import train_batches
from ghm_jax.detection.loss import detection_loss, init_ghm_states
from ghm_jax.detection.outputs import make_targets
from ghm_jax.distributed.devices import jit_init
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.runs.records import write_record
from ghm_jax.training.build import Trainer, build
from ghm_jax.training.step import microbatched_vjp

RESULT = Path(__file__).parent / "results" / "gradient_scale.json"
RECIPE = Path(__file__).with_name("coco_r50_ghm.py")
WARM_UP = 4
FORMS = ("published", "one_histogram")
TERMS = ("classification", "box")


def main(
    data_dir: str,
    steps: tuple[int, ...] = (0, 50),
    backbone: str = "resnet50",
    channels: int = 256,
    size: tuple[int, int] = (800, 1344),
    batch: int = 2,
    batches: int = 4,
    seed: int = 0,
    out: Path = RESULT,
) -> None:
    """Trains, measures at the given steps and writes the rows after each."""
    config = recipe(data_dir, backbone, channels, size, batch, seed)
    dataset = open_dataset(config.data, config.data.train_split)
    trainer = build(config, len(dataset.class_names))
    state = jit_init(trainer.init_state, jax.devices()[0])()
    step = jax.jit(trainer.step, donate_argnums=0)
    compare = Comparison(trainer)
    name = f"{backbone}, {channels} channels, {size[0]}x{size[1]}, seed {seed}"
    with contextlib.closing(train_batches(dataset, config, 0)) as loaded:
        stream: Iterator[Batch] = (item.batch for item in loaded)
        log: dict[str, list[float]] = {"loss_class": [], "loss_box": [], "grad_norm": []}
        for done in range(max(steps) + 1):
            if done in steps:
                row = compare.measure(state, stream, batches)
                row["training"] = {key: np.mean(log[key][-10:]).item() for key in log if log[key]}
                save(out, f"{name}, step {done}", row)
            if done < max(steps):
                state, metrics = step(state, next(stream))
                for key in log:
                    log[key].append(float(metrics[key]))
                print(done + 1, {key: round(log[key][-1], 3) for key in log}, flush=True)


def recipe(
    data_dir: str,
    backbone: str,
    channels: int,
    size: tuple[int, int],
    batch: int,
    seed: int,
) -> Config:
    """The published recipe from random weights, on the images of one bucket."""
    base = load_experiment(RECIPE)
    model = Model(backbone=backbone, channels=channels, norm="group", dtype="float32")
    height, width = size
    data = dataclasses.replace(
        base.data,
        name="",
        dir=data_dir,
        short_side=height,
        long_side=width,
        buckets=((height, width), (width, height), (width, width)),
    )
    rate = base.optimizer.learning_rate * batch / base.optimizer.batch_size
    optimizer = dataclasses.replace(base.optimizer, batch_size=batch, learning_rate=rate)
    run = dataclasses.replace(base.run, workers=0)
    return dataclasses.replace(
        base, seed=seed, model=model, data=data, optimizer=optimizer, run=run
    )


class Comparison:
    """Both forms of both losses on the same outputs of the network."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self.configs = {
            "published": config,
            "one_histogram": dataclasses.replace(config, loss=Loss(ghm_c=Harmonizing())),
        }
        self.model = trainer.model
        self._update = jax.jit(self._next_histograms)
        self._norms = jax.jit(self._gradient_norms)

    def measure(self, state: Any, batches: Iterator[Batch], count: int) -> dict[str, Any]:
        """Mean and range over `count` batches of what `_gradient_norms` returns."""
        ghm = {form: init_ghm_states(config) for form, config in self.configs.items()}
        for _ in range(WARM_UP):
            ghm = self._update(state, ghm, next(batches))
        found = []
        for _ in range(count):
            norms, ghm = self._norms(state, ghm, next(batches))
            found.append(jax.tree.map(float, norms))
        row: dict[str, Any] = {"batches": count}
        for term in TERMS:
            ratios = [norms[term]["published"] / norms[term]["one_histogram"] for norms in found]
            row[term] = {
                "ratio": float(np.exp(np.mean(np.log(ratios)))),
                "range": [min(ratios), max(ratios)],
                **{key: float(np.mean([n[term][key] for n in found])) for key in found[0][term]},
            }
        return row

    def _next_histograms(self, state: Any, ghm: Any, batch: Batch) -> Any:
        outputs, *_ = microbatched_vjp(self.model, state, batch.model_inputs(), 1)
        return {form: self._loss(form, outputs, batch, ghm)[1] for form in FORMS}

    def _loss(self, form: str, outputs: Any, batch: Batch, ghm: Any) -> tuple[Any, Any]:
        config = self.configs[form]
        targets = make_targets(batch, config)
        logits, deltas = outputs
        terms, following, _ = detection_loss(logits, deltas, targets, ghm[form], config=config)
        return terms, following

    def _gradient_norms(self, state: Any, ghm: Any, batch: Batch) -> tuple[dict[str, Any], Any]:
        """Norm of the gradient of all parameters by term and form, the cosine between the two
        forms and the value of the published loss; and the next histograms."""
        outputs, _, vjp = microbatched_vjp(self.model, state, batch.model_inputs(), 1)
        found: dict[str, Any] = {}
        following = dict(ghm)
        for term in TERMS:
            gradients = {}
            for form in FORMS:

                def value(outputs: Any, form: str = form, term: str = term) -> tuple[Any, Any]:
                    terms, states = self._loss(form, outputs, batch, ghm)
                    return getattr(terms, term), states

                (loss, states), of_outputs = jax.value_and_grad(value, has_aux=True)(outputs)
                gradients[form], following[form] = vjp(of_outputs), states
                found.setdefault(term, {})[f"{form}_loss"] = loss
            norms = {form: optax.tree.norm(gradients[form]) for form in FORMS}
            cosine = optax.tree.vdot(*gradients.values()) / jnp.prod(jnp.array([*norms.values()]))
            found[term] |= {**norms, "cosine": cosine}
        return found, following


def save(path: Path, key: str, row: dict[str, Any]) -> None:
    """Adds a row to the result."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows[key] = row
    print(key, json.dumps(row, indent=2), flush=True)
    write_record(path, "python -m experiments.gradient_scale", {"rows": rows}, packages=("jax",))


if __name__ == "__main__":
    tyro.cli(main)

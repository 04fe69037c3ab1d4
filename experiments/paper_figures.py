"""The figures of the paper for a finished run: gradient norms, and how each loss changes them.

    python experiments/paper_figures.py --run runs/quickstart [--out DIR] [--images 500]

Runs the trained network on validation images, with the losses of the package. GHM harmonizes the
mean histogram of a training batch (`optimizer.batch_size` images) in the bins of the run, as
published and with the run's floor. Half a minute for the quickstart on two cores.

    figure1_gradient_shares.png     where the gradient of a batch comes from, by loss
    figure2_gradient_norms.png      share of the examples by gradient norm
    figure3_class_gradients.png     gradient of each classification loss by gradient norm
    figure4_box_gradient_norms.png  as figure 2, for the boxes
    figure5_box_gradients.png       gradient of each box loss by error
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from ghm_jax import losses
from ghm_jax.batch import Batch
from ghm_jax.config import Config
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import validation_batches
from ghm_jax.detection.matching import IGNORE, Targets
from ghm_jax.detection.outputs import loss_inputs
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.exceptions import ArgumentError, UserError
from ghm_jax.plots import gradients
from ghm_jax.runs.directory import load_run
from ghm_jax.training.build import make_model

FINE_BINS = 100  # of the distributions in the paper
BINS = 30  # of GHM-C in the paper; used for GHM-R as well, where the paper does not state them

Measure = Callable[[jax.Array, jax.Array, Targets], dict[str, Any]]
"""Quantities to sum over images, from logits [b, A, K], deltas [b, A, 4] and targets."""


def main(run: str, out: str = "", images: int = 500) -> None:
    """Draws the figures.

    Args:
        run: directory of the run.
        out: directory for the figures; empty: figures/ in the run's directory.
        images: maximum number of images of the validation split.
    """
    folder = Path(out or Path(run) / "figures")
    try:
        figures = draw(Path(run), images)
    except UserError as error:
        sys.exit(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
        print(folder / f"{name}.png")


def draw(run: Path, images: int) -> dict[str, Figure]:
    """Name -> figure, for the first `images` validation images of a run.

    Raises:
        ConfigError: no run, no checkpoint, or no data.
        ArgumentError: `images` is not positive.
    """
    if images < 1:
        raise ArgumentError("images", f"must be positive, got {images}")
    directory, config = load_run(run)
    variables = restore_state(directory, config, jax.devices()[0]).variables
    sum_over = functools.partial(sum_over_images, config, variables, images)
    loss = config.loss

    def count(logits: jax.Array, deltas: jax.Array, targets: Targets) -> dict[str, Any]:
        ghm_c = functools.partial(losses.ghm_c_loss, logits, targets.classes)
        positive = (targets.classes >= 0)[..., None]
        ghm_r = functools.partial(losses.ghm_r_loss, deltas, targets.deltas, positive, mu=loss.mu)
        return {
            "class": ghm_c(bins=loss.ghm_c.bins)[2].counts,
            "class, fine": ghm_c(bins=FINE_BINS)[2].counts,
            "box": ghm_r(bins=loss.ghm_r.bins)[2].counts,
            "box, 30 bins": ghm_r(bins=BINS)[2].counts,
            "box, fine": ghm_r(bins=FINE_BINS)[2].counts,
        }

    counts, seen = sum_over(count)
    # Per training batch, because the floor is a number of examples of one batch.
    batch = {key: value * config.optimizer.batch_size / seen for key, value in counts.items()}
    ghm_c = harmonized("GHM-C", batch["class"]) | harmonized(
        "GHM-C", batch["class"], loss.ghm_c.min_count, loss.ghm_c.strength
    )
    ghm_r = harmonized("GHM-R", batch["box, 30 bins"]) | harmonized(
        "GHM-R", batch["box"], loss.ghm_r.min_count, loss.ghm_r.strength
    )

    compared = {"cross-entropy": losses.cross_entropy_loss, "focal loss": losses.focal_loss}
    for label, how in ghm_c.items():
        compared[label] = functools.partial(losses.ghm_c_loss, bins=loss.ghm_c.bins, **how)

    def totals(logits: jax.Array, _: jax.Array, targets: Targets) -> dict[str, Any]:
        return {
            label: gradients.gradient_totals(function, logits, targets.classes, loss.ghm_c.bins)
            for label, function in compared.items()
        }

    summed, _ = sum_over(totals)  # JAX sorts dicts by key
    shares = gradients.gradient_shares({key: summed[key] for key in compared})
    return {
        "figure1_gradient_shares": shares,
        **_distributions(counts["class, fine"], counts["box, fine"], loss.mu),
        "figure3_class_gradients": gradients.reformulated_class_gradients(ghm_c),
        "figure5_box_gradients": gradients.reformulated_box_gradients(ghm_r, mu=loss.mu),
    }


def _distributions(of_class: np.ndarray, of_box: np.ndarray, mu: float) -> dict[str, Figure]:
    """Figures 2 and 4, from fine histograms of both losses."""
    return {
        "figure2_gradient_norms": gradients.gradient_norm_distribution(
            of_class,
            "Gradient norms of the class scores",
            "gradient norm g = |p − p*| of an anchor and class",
        ),
        "figure4_box_gradient_norms": gradients.gradient_norm_distribution(
            of_box,
            "Gradient norms of the boxes",
            f"gradient norm of ASL1 (μ = {mu:g}) of a coordinate of a positive anchor",
            log=False,
        ),
    }


def harmonized(
    name: str, counts: np.ndarray, min_count: float = 0.0, strength: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Label -> settings of a GHM loss; the defaults of the last two are the published weights."""
    label = f"{name}, {len(counts)} bins"
    label += f", floor {min_count:g}" if min_count else ""
    label += f", strength {strength:g}" if strength != 1 else ""
    counts = np.asarray(counts, np.float32)
    return {label: {"batch_counts": counts, "min_count": min_count, "strength": strength}}


def sum_over_images(
    config: Config, variables: dict[str, Any], images: int, measure: Measure
) -> tuple[dict[str, np.ndarray], int]:
    """`measure` summed over the batches of the validation split, and the number of images."""
    dataset = open_dataset(config.data, config.data.validation_split)
    model = make_model(config, len(config.data.classes))

    @jax.jit
    def of_batch(variables: Any, batch: Batch, used: jax.Array) -> dict[str, Any]:
        logits, deltas, targets = loss_inputs(variables, batch, config=config, model=model)
        classes = jnp.where(used[:, None], targets.classes, IGNORE)
        return measure(logits, deltas, targets._replace(classes=classes))

    total, seen = {}, 0
    with contextlib.closing(validation_batches(dataset, config)) as batches:
        for loaded in batches:
            used = loaded.valid & (np.arange(len(loaded.valid)) < images - seen)
            for key, value in of_batch(variables, loaded.batch, used).items():
                total[key] = total.get(key, 0.0) + np.asarray(value, np.float64)
            seen += int(used.sum())
            if seen >= images:
                break
    return total, seen


if __name__ == "__main__":
    tyro.cli(main)

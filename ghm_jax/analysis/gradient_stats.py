"""What the losses of a trained detector see: gradient norms, weights, and sources of the gradient.

Gradient norms are |d loss / d prediction| of the plain losses: |p - p*| of an (anchor, class) pair
for cross-entropy, and the gradient of a coordinate for ASL1 (Li, Liu, Wang, "Gradient Harmonized
Single-stage Detector", AAAI 2019, equations 2 and 17). All gradients are computed by `jax.grad`
from the losses of `ghm_jax.losses`.
"""

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ghm_jax import losses
from ghm_jax.batch import Batch
from ghm_jax.config import Config
from ghm_jax.data.dataset import Dataset, open_dataset
from ghm_jax.data.loader import validation_batches
from ghm_jax.detection.anchors import level_sizes
from ghm_jax.detection.levels import split_levels
from ghm_jax.detection.loss import GHMStates, detection_loss
from ghm_jax.detection.matching import IGNORE, Targets
from ghm_jax.detection.outputs import loss_inputs
from ghm_jax.distributed.devices import (
    REPLICA,
    Device,
    choose_devices,
    parallelize,
    replicate,
    split_batch,
)
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.exceptions import ArgumentError, ConfigError
from ghm_jax.losses.density import bin_index, shares
from ghm_jax.plots.panel import stats_panel
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.directory import load_run
from ghm_jax.storage import as_path, why_not_writable, write_text
from ghm_jax.training.build import make_model
from ghm_jax.training.state import TrainState

DIFFICULTY = {"easy": (0.0, 0.1), "middle": (0.1, 0.5), "hard": (0.5, 0.9), "outlier": (0.9, 1.0)}
"""Ranges of gradient norm, [from, to); 1 counts as an outlier."""

_TENTHS = 10  # bins that make up the ranges above
_TINY = 1e-30


def write_stats(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    images: int = 500,
    data_dir: str | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Writes the `gradient_stats` of a run as stats.json, stats_classes.png and stats_boxes.png.

    Args:
        run_dir: of a run that has a checkpoint.
        out: directory for the files; None: the run's.
        split, images, data_dir, progress: as for `gradient_stats`.

    Returns:
        The statistics, and the files.

    Raises:
        ConfigError: as for `gradient_stats`.
        ArgumentError: as for `gradient_stats`, or `out` cannot be written.
    """
    folder = as_path(out or run_dir)
    if out and folder.exists() and not folder.is_dir():
        raise ArgumentError("out", f"{folder} is a file", "choose a directory")
    if why := why_not_writable(folder / "stats.json"):
        raise ArgumentError(
            "out", f"{folder} cannot be written ({why})", "choose another directory"
        )
    stats = gradient_stats(
        run_dir, split=split, images=images, data_dir=data_dir, progress=progress
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "stats.json"]
        write_text(paths[0], json.dumps(stats, indent=2) + "\n")
        for key, name in (("classification", "classes"), ("box", "boxes")):
            paths.append(folder / f"stats_{name}.png")
            drawn = io.BytesIO()
            stats_panel(key, stats[key], stats["batch_size"]).savefig(drawn, format="png")
            paths[-1].write_bytes(drawn.getvalue())
    except OSError as error:
        raise ArgumentError(
            "out", f"{folder} cannot be written ({error.strerror})", "choose another directory"
        ) from error
    return stats, paths


def gradient_stats(
    run_dir: str | Path,
    *,
    split: str | None = None,
    images: int = 500,
    data_dir: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Statistics of gradient norms and of both losses for a run's newest checkpoint.

    The network sees images without augmentation, in batches of `optimizer.batch_size`. Each batch
    is treated as the next training step would: its histogram is averaged with the moving average of
    the checkpoint. An incomplete last batch is skipped unless it is the only one.

    Args:
        run_dir: of a run that has a checkpoint.
        split: TFDS split; None: the run's validation split.
        images: maximum number of images (at least one batch is used).
        data_dir: where the data is now; None: the run's `data.dir`.
        progress: receives progress updates.

    Returns:
        `step`, `split`, `images` (number used), `batch_size`, and for `classification` and `box` a
        dict (lists are [bins]):
            loss: name of the run's loss.
            counts: mean number of examples per batch.
            positive_counts: of these, the examples whose target is 1 (`classification` only).
            ema: the checkpoint's moving average of the counts, as the loss uses it; None for other
                losses and before the first step.
            weights: mean ratio of the gradient of the loss to that of the plain loss; unless the
                loss is GHM, scaled to a mean of 1 over the examples. None for empty bins.
            gradient: share of the total gradient by loss: the plain loss, the common baseline
                and the run's loss.
            difficulty: for `easy`, `middle`, `hard` and `outlier` the `range` of gradient norm,
                the share of the `examples`, and the share of the `gradient` by loss.
            nonfinite: examples skipped because their gradient norm was NaN or infinite.

    Raises:
        ConfigError: no run, no checkpoint, or no data.
        ArgumentError: `images` is not positive.
    """
    if images < 1:
        raise ArgumentError("images", f"must be positive, got {images}")
    progress = progress or Silent()
    run, config = load_run(run_dir, data_dir=data_dir)
    split = split or config.data.validation_split
    devices = choose_devices(config.run.devices)
    config.check(len(devices))
    dataset = open_dataset(config.data, split, progress)
    if config.data.classes and dataset.class_names != config.data.classes:
        raise ConfigError(
            "data.name",
            f"{dataset.name} has other classes than {run.path} was trained on",
            "use a data set with the same class names",
        )
    state = restore_state(run, config, devices[0])
    progress.say(f"{run.path}: gradients of step {int(state.step)} on images of {dataset.name}")
    found = measure_gradients(config, dataset, state, devices, images, progress)
    progress.close()
    return {"step": int(state.step), "split": split, **found}


def measure_gradients(
    config: Config,
    dataset: Dataset,
    state: TrainState,
    devices: list[Device],
    images: int,
    progress: Progress,
) -> dict[str, Any]:
    """The `gradient_stats` of a state on the first images of a data set, except `step`, `split`."""
    size = config.optimizer.batch_size
    wanted = min(max(images // size, 1), -(-len(dataset) // size))
    step = functools.partial(_measure, config=config, num_classes=len(dataset.class_names))
    step = parallelize(step, devices, config.run.wrapper)
    carried = {**state.variables, "ghm": state.ghm}
    carried = replicate(carried, devices)
    in_training = dataclasses.replace(
        config, predict=dataclasses.replace(config.predict, batch_size=size)
    )
    total, seen, done = {}, 0, 0
    with contextlib.closing(validation_batches(dataset, in_training)) as batches:
        for loaded in batches:
            if done == wanted or (done and not loaded.valid.all()):
                break
            found = step(carried, split_batch((loaded.batch, loaded.valid), len(devices)))
            found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            total = jax.tree.map(np.add, total, found) if total else found
            seen, done = seen + int(loaded.valid.sum()), done + 1
            progress.update("stats", seen, min(wanted * size, len(dataset)), {})
    summary = functools.partial(_summary, batches=done, config=config, states=state.ghm)
    return {
        "images": seen,
        "batch_size": size,
        **{key: summary(key, total[key]) for key in ("classification", "box")},
    }


def _measure(
    state: dict[str, Any], seen: tuple[Batch, jax.Array], *, config: Config, num_classes: int
) -> dict[str, Any]:
    """Sums over the examples of all replicas, by bin of gradient norm; runs on each replica.

    `seen` is a batch and which of its images count, bool[b].
    """
    batch, valid = seen
    model = make_model(config, num_classes)
    variables = {key: state[key] for key in ("params", "batch_stats")}
    logits, deltas, targets = loss_inputs(variables, batch, config=config, model=model)
    classes = jnp.where(valid[:, None], targets.classes, IGNORE)
    targets = Targets(classes, targets.deltas)
    positive = (classes >= 0)[..., None]
    sizes = level_sizes(batch.model_inputs().padded_size, model.anchors_per_cell)

    def ours(logits: jax.Array, deltas: jax.Array) -> tuple[jax.Array, Any]:
        terms, _, stats = detection_loss(
            split_levels(logits, sizes), split_levels(deltas, sizes), targets, state["ghm"],
            config=config, axis_name=REPLICA,
        )  # fmt: skip
        return terms.classification + terms.box, stats  # each depends on only one of the inputs

    gradient_of = jax.grad(ours, argnums=(0, 1), has_aux=True)
    (by_logits, by_deltas), (stats_class, stats_box) = gradient_of(logits, deltas)
    of_class = functools.partial(_gradient, logits, classes, None)
    of_box = functools.partial(_gradient, deltas, targets.deltas, positive)
    asl1 = functools.partial(losses.asl1_loss, mu=config.loss.mu)
    norms = of_class(losses.cross_entropy_loss), of_box(asl1)
    used = jnp.broadcast_to((classes != IGNORE)[..., None], logits.shape)
    used_box = jnp.broadcast_to(positive, deltas.shape)
    is_target = classes[..., None] == jnp.arange(num_classes)[None, None]
    class_gradients = {
        "cross_entropy": norms[0],
        "focal": of_class(losses.focal_loss),
        config.loss.classification: jnp.abs(by_logits) * stats_class.num_valid,
    }
    box_gradients = {
        "asl1": norms[1],
        "smooth_l1": of_box(losses.smooth_l1_loss),
        config.loss.box: jnp.abs(by_deltas) * stats_box.num_valid,
    }
    bins_c, bins_r = config.loss.ghm_c.bins, config.loss.ghm_r.bins
    return jax.lax.psum(
        {
            "classification": _by_bin(norms[0], used, is_target, class_gradients, bins_c),
            "box": _by_bin(norms[1], used_box, used_box, box_gradients, bins_r),
        },
        REPLICA,
    )


def _gradient(
    values: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None,
    loss: Callable[..., tuple[jax.Array, Any, losses.LossStats]],
) -> jax.Array:
    """|d loss / d value| of each example, multiplied by the number of examples of all replicas."""

    def total(x: jax.Array) -> jax.Array:
        mean, _, stats = loss(x, targets, mask, axis_name=REPLICA)
        return mean * stats.num_valid

    return jnp.abs(jax.grad(total)(values))


def _by_bin(
    norm: jax.Array,
    used: jax.Array,
    positive: jax.Array,
    gradients: dict[str, jax.Array],
    bins: int,
) -> dict[str, Any]:
    """For `bins` bins and for ten: number of examples, of positive ones, and gradient by loss."""

    def sums(num_bins: int) -> dict[str, Any]:
        index = bin_index(norm, used, num_bins)

        def of_bin(number: jax.Array) -> dict[str, Any]:
            inside = index == number

            def sum_inside(values: jax.Array) -> jax.Array:
                # One axis after the other: short sums lose fewer digits.
                return jnp.where(inside, values, 0.0).sum(axis=1).sum(axis=1).sum()

            return {
                "counts": inside.sum(dtype=jnp.int32).astype(jnp.float32),
                "positive": (inside & positive).sum(dtype=jnp.int32).astype(jnp.float32),
                "gradient": {key: sum_inside(value) for key, value in gradients.items()},
            }

        # One bin at a time: a scatter-add would lose digits in the first bin.
        return jax.lax.map(of_bin, jnp.arange(num_bins, dtype=index.dtype))

    broken = used & ~jnp.isfinite(norm)
    return {
        "bins": sums(bins),
        "tenths": sums(_TENTHS),
        "nonfinite": broken.sum(dtype=jnp.int32).astype(jnp.float32),
    }


def _summary(
    key: str, total: dict[str, Any], *, batches: int, config: Config, states: GHMStates
) -> dict[str, Any]:
    """The `gradient_stats` of one loss term, from sums over `batches` batches."""
    loss = config.loss
    if key == "classification":
        name, plain, baseline = loss.classification, "cross_entropy", "focal"
        settings, state = loss.ghm_c, states.classification
    else:
        name, plain, baseline = loss.box, "asl1", "smooth_l1"
        settings, state = loss.ghm_r, states.box
    harmonized = name in ("ghm_c", "ghm_r")
    bins, tenths = total["bins"], total["tenths"]
    counts, before, after = bins["counts"], bins["gradient"][plain], bins["gradient"][name]
    weights = np.divide(after, before, out=np.full(len(counts), np.nan), where=before > 0)
    if not harmonized:
        weights *= counts.sum() / max(np.nansum(counts * weights), _TINY)

    order = dict.fromkeys((plain, baseline, name))
    edges = np.arange(_TENTHS) / _TENTHS
    difficulty = {}
    for label, (low, high) in DIFFICULTY.items():
        inside = (edges >= low) & (edges < high)
        difficulty[label] = {
            "range": [low, high],
            "examples": _share(tenths["counts"], inside),
            "gradient": {k: _share(tenths["gradient"][k], inside) for k in order},
        }
    summary = {
        "loss": name,
        "counts": (counts / batches).tolist(),
        "ema": state.average(settings).tolist() if harmonized and state.step > 0 else None,
        "weights": [float(w) if np.isfinite(w) else None for w in weights],
        "gradient": {k: shares(bins["gradient"][k]).tolist() for k in order},
        "difficulty": difficulty,
        "nonfinite": int(total["nonfinite"]),
    }
    if key == "classification":
        summary["positive_counts"] = (bins["positive"] / batches).tolist()
    return summary


def _share(values: np.ndarray, inside: np.ndarray) -> float:
    return float(values[inside].sum() / max(values.sum(), _TINY))

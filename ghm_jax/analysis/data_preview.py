"""What training will see of a data set: pictures and statistics of its batches.

Shows within a minute what would otherwise cost a day of training: wrong boxes, a crop that cuts off
everything, buckets that are mostly padding, objects that no anchor matches.
"""

import functools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from ghm_jax.batch import Batch, LoadedBatch
from ghm_jax.config import Config
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import train_batches
from ghm_jax.detection.outputs import make_targets
from ghm_jax.exceptions import ArgumentError
from ghm_jax.plots.inspection import batch_picture, statistics_figure
from ghm_jax.progress import Progress, Silent
from ghm_jax.storage import write_text

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """Measurements of training batches with N images and B boxes."""

    class_names: tuple[str, ...]
    """Names in label order."""
    boxes_per_image: np.ndarray
    """i64[N], excluding crowd regions."""
    positives_per_image: np.ndarray
    """i64[N], positive anchors."""
    padding: np.ndarray
    """f64[N], share of the padded image that is padding."""
    sides: np.ndarray
    """f64[B], square root of a box's area, in pixels of the padded image."""
    aspect_ratios: np.ndarray
    """f64[B], height / width."""
    labels: np.ndarray
    """i64[B]"""
    crowds: int
    """Number of crowd regions, which are not trained on."""
    dropped: int
    """Number of boxes beyond `data.max_boxes`, dropped."""
    shapes: dict[tuple[int, int], int]
    """Number of batches by padded (height, width)."""

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The measured quantities by their names in tables and plots."""
        return {
            "boxes per image": self.boxes_per_image,
            "positive anchors per image": self.positives_per_image,
            "side of a box, pixels": self.sides,
            "height / width of a box": self.aspect_ratios,
            "share of padding": self.padding,
        }

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of boxes per class, most frequent first."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        order = np.argsort(-counts, kind="stable")
        return {self.class_names[label]: int(counts[label]) for label in order}


def inspect_data(
    config: Config,
    out: str | Path,
    *,
    batches: int = 20,
    pictures: int = 4,
    progress: Progress | None = None,
) -> tuple[Inspection, list[Path]]:
    """Measures the first batches of a training run and draws some of them.

    Args:
        config: of the run; the batches are those it would train on, with augmentation.
        out: directory for batch_0.png, ..., statistics.png and statistics.json.
        batches: number of batches to measure.
        pictures: number of batches to draw, at most `batches`.
        progress: receives progress updates.

    Returns:
        The measurements and the files written.

    Raises:
        ConfigError: a setting is wrong or the data set cannot be read.
        ArgumentError: `batches` is not positive, or `out` is a file.
    """
    progress, out = progress or Silent(), Path(out)
    config.check()
    if batches < 1:
        raise ArgumentError("batches", f"must be positive, got {batches}")
    if out.exists() and not out.is_dir():
        raise ArgumentError("out", f"{out} is a file", "give a directory")
    dataset = open_dataset(config.data, config.data.train_split, progress)
    out.mkdir(parents=True, exist_ok=True)
    files, measured, shapes = [], [], Counter()
    loader = train_batches(dataset, config, 0)
    try:
        for number, loaded in zip(range(batches), loader, strict=False):
            measured.append(_measure(loaded, config))
            shapes[loaded.batch.model_inputs().padded_size] += 1
            if number < pictures:
                files.append(out / f"batch_{number}.png")
                _write_png(files[-1], batch_picture(loaded.batch, dataset.class_names))
            progress.update("inspect", number + 1, batches, {})
    finally:
        loader.close()
        progress.close()
    inspection = _join(measured, dataset.class_names, dict(shapes))
    title = f"{dataset.name} {config.data.train_split}: {len(inspection.padding)} images"
    files += [out / "statistics.png", out / "statistics.json"]
    statistics_figure(inspection.rows, inspection.class_counts, title).savefig(files[-2])
    write_text(files[-1], json.dumps(summary(inspection), indent=2) + "\n")
    return inspection, files


def _join(
    measured: list[dict[str, np.ndarray]],
    class_names: tuple[str, ...],
    shapes: dict[tuple[int, int], int],
) -> Inspection:
    """The measurements of all batches together."""
    joined = {key: np.concatenate([batch[key] for batch in measured]) for key in measured[0]}
    return Inspection(
        class_names=class_names,
        crowds=int(joined.pop("crowds").sum()),
        dropped=int(joined.pop("dropped").sum()),
        shapes=shapes,
        **joined,
    )


def summary(inspection: Inspection) -> dict[str, Any]:
    """The statistics as JSON data: quantiles of the measured quantities, and counts."""
    return {
        "images": len(inspection.padding),
        "boxes": len(inspection.labels),
        "crowd_regions": inspection.crowds,
        "dropped_boxes": inspection.dropped,
        "batches_of_shape": {f"{h}x{w}": count for (h, w), count in inspection.shapes.items()},
        "quantiles": {
            name: {
                "mean": float(values.mean()),
                **{
                    f"{q:g}": float(x)
                    for q, x in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
                },
            }
            for name, values in inspection.rows.items()
            if len(values)
        },
        "boxes_of_class": inspection.class_counts,
    }


def _measure(loaded: LoadedBatch, config: Config) -> dict[str, np.ndarray]:
    """The fields of `Inspection` for one batch."""
    batch, labels = loaded.batch, loaded.batch.truth.labels
    boxes = batch.truth.boxes[labels >= 0].astype(np.float64)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = np.prod(batch.model_inputs().padded_size)
    return {
        "boxes_per_image": (labels >= 0).sum(axis=1),
        "positives_per_image": _positives(batch, config),
        "padding": 1 - batch.image_size.astype(np.float64).prod(axis=1) / area,
        "sides": np.sqrt(width * height),
        "aspect_ratios": height / width,
        "labels": labels[labels >= 0].astype(np.int64),
        "crowds": batch.truth.is_crowd.sum(axis=1),
        "dropped": loaded.dropped_boxes,
    }


def _positives(batch: Batch, config: Config) -> np.ndarray:
    """Positive anchors per image, i64[N]; one image at a time to save memory."""
    each = (jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(len(batch.image_id)))
    return np.array([_count_positives(one, config) for one in each], np.int64)


@functools.partial(jax.jit, static_argnames="config")
def _count_positives(batch: Batch, config: Config) -> jax.Array:
    return (make_targets(batch, config).classes >= 0).sum()


def _write_png(path: Path, image: np.ndarray) -> None:
    done, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"cannot encode {path}")
    path.write_bytes(encoded.tobytes())

"""What training will see of a data set: its batches as pictures, and statistics of them.

Wrong boxes, a crop that cuts everything, buckets that are mostly padding, objects no anchor fits:
all of it shows in a minute here, or after a day of training.
"""

import functools
import json
from collections.abc import Mapping
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
from ghm_jax.exceptions import ConfigError
from ghm_jax.plots.inspection import batch_picture, statistics_figure
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.storage import write_text

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """Measurements of some training batches: N images with B boxes."""

    class_names: tuple[str, ...]
    """Names in label order."""
    boxes_per_image: np.ndarray
    """i64[N], without crowd regions."""
    positives_per_image: np.ndarray
    """i64[N], anchors that learn a box."""
    padding: np.ndarray
    """f64[N], share of the padded image that is no image."""
    sides: np.ndarray
    """f64[B], root of a box's area, in pixels of the padded image."""
    aspect_ratios: np.ndarray
    """f64[B], height / width."""
    labels: np.ndarray
    """i64[B]"""
    crowds: int
    """Crowd regions, which nothing learns."""
    dropped: int
    """Boxes beyond `data.max_boxes`, left out."""
    shapes: dict[tuple[int, int], int]
    """Batches of each padded (height, width)."""

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The measured quantities by their names in tables and plots."""
        return {
            "boxes an image": self.boxes_per_image,
            "positive anchors an image": self.positives_per_image,
            "side of a box, pixels": self.sides,
            "height / width of a box": self.aspect_ratios,
            "share of padding": self.padding,
        }

    @property
    def class_counts(self) -> dict[str, int]:
        """Boxes of each class, the most frequent first."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        order = np.argsort(-counts, kind="stable")
        return {self.class_names[label]: int(counts[label]) for label in order}


def inspect_data(
    config: Config,
    out: str | Path,
    *,
    num_batches: int = 20,
    num_pictures: int = 4,
    progress: Progress | None = None,
) -> tuple[Inspection, list[Path]]:
    """Measures the first batches of a training run and draws some of them.

    Args:
        config: of the run; the batches are those that it would train on, augmented.
        out: directory for batch_0.png, ..., statistics.png and statistics.json.
        num_batches: batches to measure.
        num_pictures: batches to draw, at most `num_batches`.
        progress: who hears about it.

    Returns:
        The measurements and the files written.

    Raises:
        ConfigError: a setting or the data set cannot work, or `out` is a file.
    """
    progress, out = progress or Silent(), Path(out)
    config.check()
    if num_batches < 1:
        raise ConfigError(f"--batches: must be positive, got {num_batches}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; give a directory")
    dataset = open_dataset(config.data, config.data.train_split)
    out.mkdir(parents=True, exist_ok=True)
    files, measured = [], []
    shapes: dict[tuple[int, int], int] = {}
    batches = train_batches(dataset, config, 0)
    try:
        for number, loaded in zip(range(num_batches), batches, strict=False):
            measured.append(_measure(loaded, config))
            shape = loaded.batch.model_inputs().padded_size
            shapes[shape] = shapes.get(shape, 0) + 1
            if number < num_pictures:
                files.append(out / f"batch_{number}.png")
                _write_png(files[-1], batch_picture(loaded.batch, dataset.class_names))
            progress.update("inspect", number + 1, num_batches, {})
    finally:
        batches.close()
        progress.close()
    joined = {key: np.concatenate([part[key] for part in measured]) for key in measured[0]}
    inspection = Inspection(
        class_names=dataset.class_names,
        crowds=int(joined.pop("crowds").sum()),
        dropped=int(joined.pop("dropped").sum()),
        shapes=shapes,
        **joined,
    )
    figure = statistics_figure(
        inspection.rows,
        inspection.class_counts,
        title=f"{dataset.name} {config.data.train_split}: {len(inspection.padding)} images",
    )
    files += [out / "statistics.png", out / "statistics.json"]
    figure.savefig(files[-2])
    write_text(files[-1], json.dumps(summary(inspection), indent=2) + "\n")
    return inspection, files


def summary(inspection: Inspection) -> dict[str, Any]:
    """The statistics as plain data: quantiles of the measured quantities, and counts."""
    return {
        "images": len(inspection.padding),
        "boxes": len(inspection.labels),
        "crowd_regions": inspection.crowds,
        "dropped_boxes": inspection.dropped,
        "batches_of_shape": {f"{h}x{w}": count for (h, w), count in inspection.shapes.items()},
        "quantiles": {
            name: {
                "mean": float(values.mean()),
                **{f"{q:g}": float(x) for q, x in zip(QUANTILES, _quantiles(values), strict=True)},
            }
            for name, values in inspection.rows.items()
            if len(values)
        },
        "boxes_of_class": inspection.class_counts,
    }


def table(inspection: Inspection, classes: int = 20) -> str:
    """The statistics for a terminal, with the `classes` most frequent classes."""
    images, boxes = len(inspection.padding), len(inspection.labels)
    without = int((inspection.boxes_per_image == 0).sum())
    lines = [
        f"{images:,} images, {without:,} without boxes; {boxes:,} boxes, "
        f"{inspection.dropped:,} more left out by data.max_boxes; "
        f"{inspection.crowds:,} crowd regions",
        "batches: " + ", ".join(f"{n} of {h}x{w}" for (h, w), n in inspection.shapes.items()),
        "",
        f"{'':<28}{'mean':>9}{'least':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'most':>9}",
    ]
    for name, values in inspection.rows.items():
        if len(values):
            figures = (values.mean(), *_quantiles(values))
            lines.append(f"{name:<28}" + "".join(f"{x:>9.3g}" for x in figures))
    lines += ["", f"{'class':<28}{'boxes':>9}{'share':>9}"]
    counts: Mapping[str, int] = inspection.class_counts
    for name, count in list(counts.items())[:classes]:
        lines.append(f"{name:<28}{count:>9,}{count / max(boxes, 1):>9.1%}")
    rest = list(counts.values())[classes:]
    if rest:
        lines.append(
            f"{f'{len(rest)} more classes':<28}{sum(rest):>9,}{sum(rest) / max(boxes, 1):>9.1%}"
        )
    return "\n".join(lines)


def _quantiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, QUANTILES)


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
    """Positive anchors of each image, i64[N]; one image at a time, which needs little memory."""
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

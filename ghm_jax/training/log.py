"""The training log: metrics.jsonl, metric writers, the progress line, warnings of NaN or Inf."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ghm_jax.batch import LoadedBatch
from ghm_jax.config import Config
from ghm_jax.distributed.processes import is_first
from ghm_jax.progress import Progress
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.runs.history import append_line, read_history, rewrite
from ghm_jax.storage import GrowingFiles
from ghm_jax.training.metric_writers import MetricWriter, TensorBoard, WeightsAndBiases
from ghm_jax.training.optimizer import learning_rate


class TrainingDiverged(RuntimeError):  # noqa: N818 (it is what happened)
    """Too many consecutive updates held NaN or Inf. The message is one line with the remedy."""


class TrainingLog:
    """Writes metrics to `metrics.jsonl` and the metric writers, and warns about NaN and Inf.

    With several processes, only the first one writes. Metrics of a step are fetched from the
    devices one step later, so that the devices never wait.

    Args:
        run: the run to write to.
        config: resolved.
        start: steps done; records of later steps are removed.
        progress: receives progress updates.
        ideal_seconds: seconds per image at the devices' peak, by (height, width), for the MFU; see
            `ghm_jax.analysis.cost.ideal_seconds`.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        start: int,
        progress: Progress,
        ideal_seconds: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        self._config, self._run, self._progress = config, run, progress
        self._rate = learning_rate(config.optimizer)
        self._writes = is_first()
        self._files = GrowingFiles(run.path)
        self.growing = RunDirectory(self._files.path)
        """Where the files that grow are written."""
        history = self._begin(run.history, self.growing.history, start)
        self._begin(run.evaluations, self.growing.evaluations, start)
        self._writers: list[MetricWriter] = []
        if self._writes:
            self._writers.append(TensorBoard(self.growing.tensorboard, start))
        if self._writes and config.run.wandb:
            self._writers.append(WeightsAndBiases(run, config, self._files.path))
        self._warned = False
        # Skipped updates that were already reported.
        self._skipped = history[-1].get("skipped") or 0 if history else 0
        self._seconds = history[-1].get("seconds") or 0.0 if history else 0.0
        self._pending: tuple[int, Any, float] | None = None
        self._since = time.perf_counter()
        self._last_step = start
        self._ideal_seconds = ideal_seconds or {}
        self._ideal = self._waited = 0.0  # seconds since the last record
        self._latest: Any = None  # an array of the last step (type checkers do not know `is_ready`)

    def _begin(self, old: Path, new: Path, start: int) -> list[dict[str, Any]]:
        """The records of a file up to the step from which the run resumes, which are kept."""
        there = old.is_file()
        records = read_history(old) if there else []
        records = [record for record in records if record["step"] <= start]
        if self._writes and (there or old == self._run.history):
            rewrite(new, records)
        return records

    def next_batch(self, batches: Iterator[LoadedBatch]) -> LoadedBatch:
        """The next batch. Time spent here counts as waiting for data if the devices are idle.

        The loop runs ahead of the devices: while they have a step to do, waiting costs nothing.
        """
        start = time.perf_counter()
        loaded = next(batches)
        if self._latest is None or self._latest.is_ready():
            self._waited += time.perf_counter() - start
        size = loaded.batch.model_inputs().padded_size
        self._ideal += self._config.optimizer.batch_size * self._ideal_seconds.get(size, 0.0)
        return loaded

    def record(self, done: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step, and writes those of the step before if they are due."""
        self.flush()
        self._latest = metrics["loss"]
        optimizer, run = self._config.optimizer, self._config.run
        if done % run.log_every == 0 or done in (1, optimizer.steps):
            self._pending = (done, metrics, self._ideal)
            self._ideal = 0.0

    def flush(self) -> None:
        """Writes what is pending; a skipped step gives a warning instead.

        Raises:
            TrainingDiverged: `run.max_skipped` consecutive updates, or more, were skipped.
        """
        if self._pending is None:
            return
        done, metrics, ideal = self._pending
        self._pending = None
        values = jax.tree.map(lambda x: np.asarray(x).tolist(), jax.device_get(metrics))
        images_at_fault = [number for number in values.pop("nonfinite_images") if number >= 0]
        record = self._make_record(done, values, ideal)
        if values["skipped"] > self._skipped:
            self._skipped = values["skipped"]
            self._warn_about_skipped(done, values, images_at_fault)
        if values["skipped_in_a_row"]:
            return
        self._write(self.growing.history, record)
        steps = self._config.optimizer.steps
        self._progress.update("train", done, steps, progress_fields(record))

    def _make_record(self, done: int, values: dict[str, Any], ideal: float) -> dict[str, Any]:
        """A line of metrics.jsonl; restarts the clock for the next one."""
        now = time.perf_counter()
        elapsed = now - self._since
        self._seconds += elapsed
        record = {
            "step": done,
            **values,
            "learning_rate": np.asarray(self._rate(done - 1)).item(),
            "images_per_second": (done - self._last_step)
            * self._config.optimizer.batch_size
            / elapsed,
            "data_wait": self._waited / elapsed,
            "seconds": self._seconds,
        }
        if self._ideal_seconds:
            record["mfu"] = ideal / elapsed
        self._since, self._last_step, self._waited = now, done, 0.0
        return record

    def _warn_about_skipped(self, done: int, values: dict[str, Any], images: list[int]) -> None:
        in_a_row, total = values["skipped_in_a_row"], values["skipped"]
        line = f"step {done}: skipped {total} update{'s' * (total > 1)}"
        if in_a_row:
            line += f" ({in_a_row} consecutive): {what_is_wrong(values, images)}"
        if in_a_row < self._config.run.max_skipped:
            self._progress.say(f"warning: {line}")
            return
        raise TrainingDiverged(
            f"{line}; lower `optimizer.learning_rate` or `optimizer.clip_norm`, and `restart`"
        )

    def evaluated(
        self, done: int, figures: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Writes the COCO figures of a step; the time they took is not training time.

        Args:
            done: steps.
            figures: the twelve COCO figures by name.
            pictures: uint8[H, W, 3] by name, of validation images.
        """
        self._write(self.growing.evaluations, {"step": done, **figures}, "validation", pictures)
        self._progress.say(f"step {done}: AP {100 * figures['AP']:.1f} on the validation split")
        self._since, self._waited = time.perf_counter(), 0.0

    def _write(
        self,
        path: Path,
        record: dict[str, Any],
        group: str = "train",
        pictures: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Adds a record to a file and the metric writers. A full disk does not end the training."""
        if not self._writes:
            return
        try:
            append_line(path, record)
            for writer in self._writers:
                writer.add(group, record, pictures or {})
            self._files.copy_if_due()
            self._warned = False
        except OSError as error:
            self._warn(error, path)

    def _warn(self, error: OSError, path: Path) -> None:
        if not self._warned:
            what = error.filename or path
            self._progress.say(f"{what}: cannot be written ({error.strerror}); training continues")
        self._warned = True

    def before_checkpoint(self) -> None:
        """Writes what is pending, so that no record of a step is lost once its state is saved.

        Raises:
            TrainingDiverged: see `flush`.
        """
        self.flush()
        try:
            self._files.copy()
        except OSError as error:
            self._warn(error, self._run.path)

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers:
            writer.close()
        try:
            self._files.close()
        except OSError as error:
            self._warn(error, self._run.path)


def progress_fields(record: Mapping[str, Any]) -> dict[str, str]:
    """What the progress line shows of a record, the most important first."""
    fields = {
        "class": f"{record['loss_class']:.3g}",
        "box": f"{record['loss_box']:.3g}",
        "lr": f"{record['learning_rate']:.3g}",
        "img/s": f"{record['images_per_second']:.3g}",
        "data": f"{record['data_wait']:.0%}",
    }
    if "mfu" in record:
        fields["MFU"] = f"{record['mfu']:.0%}"
    return fields | {"CE": f"{record['cross_entropy']:.3g}"}


def what_is_wrong(values: Mapping[str, Any], images: Sequence[int]) -> str:
    """Where a step had NaN or Inf: in which loss, bin and images.

    Args:
        values: metrics of `train_step`, as numbers and lists.
        images: ids of the images for which the network's outputs were not finite.
    """
    bad = [name for name in ("loss_class", "loss_box") if not np.isfinite(values[name])]
    if images or values["num_nonfinite"]:
        what = "NaN or Inf in the network's outputs"
    elif bad:
        what = f"NaN or Inf in {' and '.join(bad)}"
    else:
        what = "NaN or Inf in the gradient, not in the loss"
    if images:
        what += f" for image{'s' * (len(images) > 1)} {', '.join(map(str, images[:5]))}"
        what += f" and {len(images) - 5} more" * (len(images) > 5)
    for name in ("ghm_c", "ghm_r"):
        weights = np.asarray(values.get(name, {}).get("weights", [0.0]))
        heaviest = int(np.argmax(np.where(np.isfinite(weights), weights, np.inf)))
        if not weights[heaviest] < 100:  # common weights are below 10
            what += f", {name} weights bin {heaviest} of {len(weights)} by {weights[heaviest]:.3g}"
    return what

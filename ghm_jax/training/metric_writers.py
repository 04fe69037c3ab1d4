"""Where the metrics of a run are shown: TensorBoard, and Weights & Biases on request."""

import contextlib
import errno
import importlib
import importlib.util
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from ghm_jax.config import Config, to_dict
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.storage import write_text

_EVENTS: Any = event_pb2  # generated: type checkers see nothing in them
_SUMMARIES: Any = summary_pb2


class MetricWriter(Protocol):
    """What the training log writes to."""

    def add(
        self, group: str, record: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Writes a record of a step.

        Args:
            group: `train` or `validation`.
            record: `step`; numbers; and histograms of gradient norms over [0, 1], each a dict of
                `counts` and mean `weights` by bin.
            pictures: uint8[H, W, 3], RGB, by name.

        Raises:
            OSError: it could not be written.
        """
        ...

    def close(self) -> None:
        """Called once, after the last record."""
        ...


def check_writers(config: Config) -> None:
    """Raises ConfigError if a metric writer that the config asks for cannot work."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "run.wandb",
            "the package wandb is not installed",
            'pip install "ghm-jax[wandb]", or turn the setting off',
        )


def histograms(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """The histograms of a record by name: the examples per bin, and their total weight after
    harmonizing."""
    found = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found[f"{key}/gradient_norm"] = value["counts"]
            weighted = np.multiply(value["counts"], value["weights"])
            found[f"{key}/gradient_norm_harmonized"] = weighted.tolist()
    return found


class TensorBoard:
    """Event files of TensorBoard, written synchronously: tensorboardX's own SummaryWriter writes in
    a thread, which dies when the disk is full, and the training would then wait for it forever."""

    def __init__(self, directory: Path, start: int) -> None:
        """`start`: steps done; TensorBoard discards records of later ones."""
        self._directory, self._start = directory, start
        self._writer: EventsWriter | None = None

    def add(
        self, group: str, record: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """See `MetricWriter`."""
        step = record["step"]
        if self._writer is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._directory / "events"))
            # Records of later steps in other files come from before the resume.
            status = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
            self._write(_EVENTS.Event(step=self._start + 1, session_log=status))
        new = [
            summary.scalar(f"{group}/{key}", value)
            for key, value in record.items()
            if key != "step" and not isinstance(value, Mapping)
        ]
        new += [_histogram(name, counts) for name, counts in histograms(record).items()]
        new += [_picture(f"{group}/{name}", picture) for name, picture in pictures.items()]
        for value in new:
            self._write(_EVENTS.Event(step=step, summary=value))
        self._writer.flush()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        if self._writer is not None:
            self._writer.write_event(event)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def _histogram(tag: str, counts: list[float]) -> Any:
    edges = (np.arange(len(counts)) + 1) / len(counts)
    centers = edges - 0.5 / len(counts)
    return summary.histogram_raw(
        tag,
        min=0.0,
        max=1.0,
        num=sum(counts),
        sum=float(np.dot(counts, centers)),
        sum_squares=float(np.dot(counts, centers**2)),
        bucket_limits=edges.tolist(),
        bucket_counts=counts,
    )


def _picture(tag: str, picture: np.ndarray) -> Any:
    """As JPEG, a tenth of the PNG that tensorboardX would write."""
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, 85))
    height, width = picture.shape[:2]
    image = _SUMMARIES.Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=encoded.tobytes()
    )
    return _SUMMARIES.Summary(value=[_SUMMARIES.Summary.Value(tag=tag, image=image)])


class WeightsAndBiases:
    """A run of Weights & Biases with the same records under the same names.

    A resumed run is one run there as well: its id is kept in the run's directory. W&B's own
    environment variables, such as WANDB_PROJECT and WANDB_MODE=offline, decide where it goes.
    """

    def __init__(self, run: RunDirectory, config: Config, directory: Path | None = None) -> None:
        """
        Args:
            run: with the id of its run there, if it has one.
            config: resolved.
            directory: on a disk, for what W&B itself keeps; None: that of the run.

        Raises:
            ConfigError: W&B cannot start a run, for example without a login.
        """
        self._wandb: Any = importlib.import_module("wandb")
        if not run.wandb_id.is_file():
            write_text(run.wandb_id, secrets.token_hex(4) + "\n")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ghm-jax"),
                name=run.path.resolve().name,
                id=run.wandb_id.read_text().strip(),
                resume="allow",
                dir=str(directory or run.path),
                config=to_dict(config),
            )
        except Exception as error:
            raise ConfigError(
                "run.wandb",
                _first_line(error),
                "run 'wandb login' once, set WANDB_MODE=offline, or turn the setting off",
            ) from error
        # Steps trained again after a crash are logged twice, which W&B's own step count forbids.
        self._run.define_metric("*", step_metric="step")

    def add(
        self, group: str, record: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """See `MetricWriter`."""
        values: dict[str, Any] = {"step": record["step"]}
        for key, value in record.items():
            if key != "step" and not isinstance(value, Mapping):
                values[f"{group}/{key}"] = value
        try:
            for name, counts in histograms(record).items():
                edges = np.linspace(0.0, 1.0, len(counts) + 1)
                values[name] = self._wandb.Histogram(np_histogram=(np.asarray(counts), edges))
            for name, picture in pictures.items():
                values[f"{group}/{name}"] = self._wandb.Image(picture)
            self._run.log(values)
        except Exception as error:  # whatever happens to the service, the training continues
            raise OSError(errno.EIO, _first_line(error), "Weights & Biases") from error

    def close(self) -> None:
        """Ends the run at W&B, once everything has been sent."""
        with contextlib.suppress(Exception):
            self._run.finish()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")

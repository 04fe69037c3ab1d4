"""Training, in reading order."""

import contextlib
import dataclasses
import functools
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from ghm_jax.checkpoint import Checkpoints
from ghm_jax.config import Config
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import train_batches
from ghm_jax.parallel import REPLICA, choose_devices, parallelize, split_batch
from ghm_jax.plots.report import read_history
from ghm_jax.progress import Progress, Silent
from ghm_jax.rundir import RunDirectory, claim_run, set_aside, write_text
from ghm_jax.schedule import learning_rate, make_optimizer
from ghm_jax.step import TrainState, init_state, make_model, train_step
from ghm_jax.weights import load_backbone


class TrainingDiverged(RuntimeError):  # noqa: N818 (it is what happened)
    """A loss or a logit was not finite. The message is one line with the remedy."""


class TrainingInterrupted(RuntimeError):  # noqa: N818
    """Someone asked the run to stop; a checkpoint is written. The message is one line."""


def train(
    config: Config,
    run_dir: str | Path,
    *,
    restart: bool = False,
    progress: Progress | None = None,
) -> TrainState:
    """Trains a detector, or goes on with a run that was stopped.

    Args:
        config: what to do.
        run_dir: where checkpoints, logs and the resolved config go; see `ghm_jax.rundir`.
        restart: move an existing run aside and start anew.
        progress: who hears about it.

    Returns:
        The state after the last step.

    Raises:
        ConfigError: something that was asked for cannot work; nothing has been computed.
        TrainingDiverged: a loss was not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    progress = progress or Silent()

    # Everything that a person can get wrong, before any compute.
    devices = choose_devices(config.run.devices)
    config.check(len(devices))
    dataset = open_dataset(config.data, config.data.train_split)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, classes=dataset.class_names)
    )
    optimizer = make_optimizer(config)
    model = make_model(config, len(dataset.class_names), REPLICA)
    initialize = functools.partial(init_state, config, model, optimizer)
    pretrained = None
    if config.model.weights and (restart or not RunDirectory(Path(run_dir)).has_checkpoint):
        blank = jax.eval_shape(initialize)
        like = {"params": blank.params, "batch_stats": blank.batch_stats}
        pretrained = load_backbone(config.model, like)
    if restart and Path(run_dir).exists():
        progress.say(f"moved the old run to {set_aside(Path(run_dir))}")
    run = claim_run(run_dir, config)

    # The step of one replica, on all devices.
    step = functools.partial(
        train_step, config=config, model=model, optimizer=optimizer, axis_name=REPLICA
    )
    step = parallelize(step, devices, config.run.wrapper, donate=True)
    # XLA's CPU compiler is slow on random initializers, which run once: it need not optimize them.
    options = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else None
    state = jax.jit(initialize, compiler_options=options)(pretrained)

    with Checkpoints(run.checkpoints, config.run.keep) as checkpoints:
        start = checkpoints.latest or 0
        if checkpoints.latest is not None:  # 0: an imported detector
            state = checkpoints.restore(state)
        total = config.optimizer.steps
        if start >= total:
            progress.say(
                f"{run.path}: complete at step {start}, nothing to train (--restart: anew)"
            )
            return state
        what = "new run" if checkpoints.latest is None else f"resuming at step {start}"
        progress.say(
            f"{run.path}: {what} of {total} steps on {len(devices)} {devices[0].platform} "
            f"device{'s' * (len(devices) > 1)}, {len(dataset)} images of {dataset.name}"
        )
        progress.say("compiling the training step, half a minute or so ...")

        done = start
        log = TrainingLog(run, config, start, progress)
        batches = train_batches(dataset, config, start)
        try:
            with stop_on_signal(progress) as stopping:
                while done < total and not stopping.is_set():
                    state, metrics = step(state, split_batch(next(batches), len(devices)))
                    done += 1
                    log.record(done, metrics)
                    if done % config.run.checkpoint_every == 0:
                        log.flush()  # so that a logged step is checked before its state is saved
                        checkpoints.save(done, state)
            log.flush()
            checkpoints.save(done, state)
            checkpoints.wait()
        finally:
            batches.close()
            log.close()
            progress.close()
    if done < total:
        raise TrainingInterrupted(f"stopped at step {done} of {total}, checkpoint written")
    return state


class TrainingLog:
    """Writes metrics to `metrics.jsonl` and TensorBoard, and checks that they are finite.

    Metrics of a step are fetched from the devices one step later, so that the devices never wait.
    """

    def __init__(self, run: RunDirectory, config: Config, start: int, progress: Progress) -> None:
        self._config, self._run, self._progress = config, run, progress
        self._rate = learning_rate(config.optimizer)
        history = read_history(run.history) if run.history.is_file() else []
        history = [record for record in history if record["step"] <= start]
        write_text(run.history, "".join(json.dumps(record) + "\n" for record in history))
        self._file = run.history.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run.tensorboard), purge_step=start + 1)
        self._seconds = history[-1]["seconds"] if history else 0.0
        self._pending: tuple[int, Any] | None = None
        self._since = time.perf_counter()
        self._last_step = start

    def record(self, done: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step; those of an earlier one may be written now."""
        self.flush()
        optimizer, run = self._config.optimizer, self._config.run
        if done % run.log_every == 0 or done in (1, optimizer.steps):
            self._pending = (done, metrics)

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
            TrainingDiverged: it is not finite.
        """
        if self._pending is None:
            return
        done, metrics = self._pending
        self._pending = None
        values = jax.tree.map(lambda x: np.asarray(x).tolist(), jax.device_get(metrics))
        now = time.perf_counter()
        images = (done - self._last_step) * self._config.optimizer.batch_size
        self._seconds += now - self._since
        record = {
            "step": done,
            **values,
            "learning_rate": np.asarray(self._rate(done - 1)).item(),
            "images_per_second": images / (now - self._since),
            "seconds": self._seconds,
        }
        self._since, self._last_step = now, done
        if values["num_nonfinite"] or not np.isfinite(values["loss"]):
            raise TrainingDiverged(
                f"the loss is not finite at step {done} ({values['num_nonfinite']:.0f} values); "
                "lower --optimizer.learning-rate or --optimizer.clip-norm, and --restart"
            )
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, value in record.items():
            if isinstance(value, dict):
                self._board_histogram(f"{key}/gradient_norm", value["counts"], done)
            elif key != "step":
                self._board.add_scalar(f"train/{key}", value, done)
        self._progress.update(
            "train",
            done,
            self._config.optimizer.steps,
            {
                "class": f"{values['loss_class']:.3f}",
                "box": f"{values['loss_box']:.4f}",
                "cross-entropy": f"{values['cross_entropy']:.5f}",
                "images/s": f"{record['images_per_second']:.0f}",
            },
        )

    def _board_histogram(self, tag: str, counts: list[float], done: int) -> None:
        edges = (np.arange(len(counts)) + 1) / len(counts)
        centers = edges - 0.5 / len(counts)
        self._board.add_histogram_raw(
            tag,
            min=0.0,
            max=1.0,
            num=sum(counts),
            sum=float(np.dot(counts, centers)),
            sum_squares=float(np.dot(counts, centers**2)),
            bucket_limits=edges.tolist(),
            bucket_counts=counts,
            global_step=done,
        )

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._board.close()


@contextlib.contextmanager
def stop_on_signal(progress: Progress) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once.

    In the middle of a step the old state is already given away, so a run can only stop between
    steps. Outside the main thread nothing is caught.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def on_signal(number: int, frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()
        progress.say("stopping after this step ... (once more: at once, without a checkpoint)")

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

"""What the training log writes, given metrics by hand."""

import itertools
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Listener, tiny_config

from ghm_jax.data.batching import Example, collate
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.training.log import TrainingLog

METRICS = {
    **dict.fromkeys(("loss", "loss_class", "loss_box", "cross_entropy", "box_error"), 0.5),
    **{"num_positive": 9.0, "num_nonfinite": 0.0, "grad_norm": 1.0},
    **{"skipped": 0, "skipped_in_a_row": 0, "nonfinite_images": np.array([-1])},
    "ghm_c": {"counts": np.arange(10.0), "weights": np.ones(10)},
}


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("ghm_jax.training.log.time.perf_counter", lambda: self.now)

    def batches(self, seconds, sizes=((64, 96),)):
        """Batches of 4 images of these sizes in turn, `seconds` later each time."""
        for pause, size in zip(seconds, itertools.cycle(sizes), strict=False):
            self.now += pause
            yield batch_of(*size)


def batch_of(height, width):
    """A loaded batch of 4 black images."""
    return collate([Example(np.zeros((height, width, 3), np.uint8))] * 4, (height, width), 1)


class Loss:
    """A number on devices that may not have it yet."""

    def __init__(self, ready):
        self._ready = ready

    def is_ready(self):
        return self._ready

    def __array__(self, dtype=None, copy=None):
        return np.asarray(0.5, dtype)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def records(run):
    return [json.loads(line) for line in run.history.read_text().splitlines()]


@pytest.mark.parametrize(("ready", "waits"), [(True, [0.5, 0.5]), (False, [0.5, 0.0])])
def test_only_idle_devices_wait_for_data(run, monkeypatch, ready, waits):
    clock = Clock(monkeypatch)
    log = TrainingLog(run, tiny_config(), 0, Listener())
    batches = clock.batches([2.0, 3.0])
    for done in (1, 2):
        log.next_batch(batches)
        clock.now += done + 1  # 2 and 3 seconds of other work
        log.record(done, METRICS | {"loss": Loss(ready)})
        log.flush()
    log.close()
    assert [record["data_wait"] for record in records(run)] == waits
    assert [record["images_per_second"] for record in records(run)] == [1, pytest.approx(4 / 6)]


def test_evaluation_does_not_count_as_training_time(run, monkeypatch):
    clock = Clock(monkeypatch)
    log = TrainingLog(run, tiny_config(), 0, Listener())
    batches = clock.batches([1.0, 1.0])
    for done in (1, 2):
        log.next_batch(batches)
        log.record(done, METRICS | {"loss": Loss(True)})
        log.flush()
        clock.now += 100.0
        log.evaluated(done, {"AP": 0.25}, {})
    log.close()
    assert [record["seconds"] for record in records(run)] == [1.0, 2.0]
    assert [record["data_wait"] for record in records(run)] == [1.0, 1.0]


def test_the_mfu_counts_the_images_of_every_size(run, monkeypatch):
    clock = Clock(monkeypatch)
    listener = Listener()
    # Four images take 0.8 seconds at the peak, those of the other size 2.
    log = TrainingLog(run, tiny_config(), 0, listener, {(64, 96): 0.2, (96, 64): 0.5})
    batches = clock.batches([0.5, 1.0, 0.5], sizes=[(64, 96), (96, 64)])
    for done in (1, 2, 3):
        log.next_batch(batches)
        clock.now += 0.5
        log.record(done, METRICS | {"loss": jnp.asarray(0.5)})
        log.flush()
    log.close()
    assert [record["mfu"] for record in records(run)] == pytest.approx([0.8, 2 / 1.5, 0.8])


def test_the_progress_line_shows_the_fields_of_the_record(run):
    fields = []

    class Progress(Listener):
        def update(self, name, done, total, shown):
            fields.append(shown)

    log = TrainingLog(run, tiny_config(), 0, Progress(), {(64, 96): 1e-9})
    start = time.perf_counter()
    log.next_batch(iter([batch_of(64, 96)]))
    log.record(1, METRICS | {"loss": jnp.asarray(0.5)})
    log.flush()
    log.close()
    (record,) = records(run)
    assert list(fields[0]) == ["class", "box", "lr", "img/s", "data", "MFU", "CE"]
    assert fields[0]["lr"] == "0.001"
    assert fields[0]["data"].endswith("%")
    assert 0 <= record["data_wait"] <= 1
    assert record["seconds"] <= time.perf_counter() - start + 1


def test_updates_skipped_before_a_restart_are_not_reported_again(run):
    listener = Listener()
    for done in (1, 2):  # each by a new command
        log = TrainingLog(run, tiny_config(), done - 1, listener)
        log.record(done, METRICS | {"skipped": 1})
        log.flush()
        log.close()
    assert listener.lines == ["warning: step 1: skipped 1 update"]

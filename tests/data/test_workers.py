"""Worker processes that the machine has no room for are refused before they start."""

import dataclasses
import multiprocessing
import shutil
from collections import namedtuple

import pytest
from tiny import tiny_config

from ghm_jax.analysis.doctor import examine
from ghm_jax.config import Data
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import train_batches, validation_batches
from ghm_jax.data.workers import check_workers
from ghm_jax.exceptions import ConfigError
from ghm_jax.train import train

Usage = namedtuple("Usage", "total used free")
DATA = Data(buckets=((64, 96), (96, 32)))
BATCH = 64 * 96 * 3  # bytes of the largest image
MOST = 8  # batches of one worker that were seen at once in shared memory


@pytest.fixture
def room(monkeypatch):
    """Sets the shared memory that is free, in bytes."""

    def set_room(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**13, 0, free))

    return set_room


def test_workers_need_room_for_all_batches_on_their_way(room):
    needed = MOST * 3 * 5 * BATCH  # 3 workers, 5 images a batch
    room(needed)
    check_workers(DATA, 5, 3)
    room(needed - 1)
    with pytest.raises(ConfigError) as refused:
        check_workers(DATA, 5, 3)
    line = str(refused.value)
    assert line.startswith(f"run.workers: 3 workers need {-(-needed // 10**6)} MB")
    assert f"--shm-size {-(-needed // 2**20)}m" in line
    assert "`run.workers`" in line
    check_workers(DATA, 5, 0)


def test_without_semaphores_there_is_a_remedy(monkeypatch):
    def missing(self, value=1):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.get_context("spawn").__class__, "Semaphore", missing)
    with pytest.raises(ConfigError, match=r"run.workers: .*semaphores.*No space.*`run.workers` 0"):
        check_workers(DATA, 1, 1)


def test_training_and_evaluation_refuse_before_any_work(dataset_dir, tmp_path, room):
    config = tiny_config(dataset_dir)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, workers=2))
    dataset = open_dataset(config.data, "train")
    room(10_000)
    for start in (
        lambda: train(config, tmp_path / "run"),
        lambda: train_batches(dataset, config, 0),
        lambda: validation_batches(dataset, config),
    ):
        with pytest.raises(ConfigError, match="shared memory"):
            start()
    assert not list(tmp_path.iterdir())
    faults = [finding for finding in examine(config) if finding.what == "memory"]
    assert [finding.good for finding in faults] == [False]  # doctor says the same
    assert "shm-size" in faults[0].remedy

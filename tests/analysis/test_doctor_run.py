"""Each kind of fault of a run, made by hand, is named by `ghm-jax doctor` with its remedy."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest
from published_tensors import published_shapes
from safetensors.numpy import save_file
from tiny import tiny_config

from ghm_jax.analysis.doctor import examine
from ghm_jax.config import Config, Model
from ghm_jax.data.workers import SharedMemory
from ghm_jax.models.weight_names import BACKBONE
from ghm_jax.runs.directory import load_run
from ghm_jax.runs.lock import LOCK, SILENCE, lock_directory
from ghm_jax.training.build import build

pytestmark = pytest.mark.usefixtures("quick_compilation")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**13, 0, 10**13))
    monkeypatch.setenv("GHM_JAX_CACHE", str(tmp_path))
    # These are the same in every test, and have their own.
    for check in ("_packages", "_decoders", "_evaluators"):
        monkeypatch.setattr(f"ghm_jax.analysis.doctor.machine.{check}", lambda: iter(()))


@pytest.fixture
def run(finished_run, tmp_path):
    """A run to break."""
    return Path(shutil.copytree(finished_run[0].path, tmp_path / "run"))


def examined(run, config=None, **arguments):
    found = examine(config or load_run(run)[1], str(run), **arguments)
    # No object of this data set is of the class `absent`, which is a fault already.
    return [f for f in found if "(absent)" not in f.says]


def fault(found):
    (one,) = (f for f in found if not f.good)
    assert one.remedy
    assert "\n" not in one.says + one.remedy
    return one


def test_a_run_that_is_well_has_no_fault_and_is_not_changed(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = examined(run)
    assert all(f.good for f in found), found
    assert any("has a checkpoint of step 6" in f.says for f in found)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("number_types")
def test_options_on_number_types_are_no_fault(run):
    assert all(f.good for f in examined(run))


def test_a_path_whose_checkpoints_could_not_be_read_back(run):
    found = fault(examined(run.rename(run.with_name("lr[0.1]"))))
    assert "lr[0.1]" in found.says
    assert "rename" in found.remedy


def test_a_lock_of_a_job_that_lives_or_was_killed(run):
    with lock_directory(run, pytest.fail):
        found = examined(run)
    assert all(f.good for f in found)
    assert any(f"is being trained by process {os.getpid()}" in f.says for f in found)

    code = "import sys, pathlib\nfrom ghm_jax.runs.lock import Lock\n"
    code += "import os\nLock(pathlib.Path(sys.argv[1]))\nos._exit(1)"
    subprocess.run([sys.executable, "-c", code, run / LOCK], check=False)
    (lock,) = (f for f in examined(run) if f.what == "lock")
    assert lock.good
    assert "stale lock of process" in lock.says
    assert (run / LOCK).exists()

    elsewhere = {"host": "far", "pid": 7, "started": "1", "place": "far"}
    (run / LOCK).write_text(json.dumps(elsewhere))
    (lock,) = (f for f in examined(run) if f.what == "lock")
    assert "is being trained by process 7 on far (last sign of life 0 s ago)" in lock.says
    old = (run / LOCK).stat().st_mtime - SILENCE - 5
    os.utime(run / LOCK, (old, old))
    (lock,) = (f for f in examined(run) if f.what == "lock")
    assert "stale lock of process 7 on far" in lock.says


def newest(run):
    return max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))


def damage(checkpoint):
    for path in (checkpoint / "default").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_with_and_without_an_older_one(run):
    shutil.copytree(newest(run), run / "checkpoints" / "9")
    damage(run / "checkpoints" / "9")
    found = examined(run)
    assert "the checkpoint of step 9 is damaged" in fault(found).says
    assert "step 6" in fault(found).remedy
    for path in (run / "checkpoints").iterdir():
        damage(path)
    assert "cannot be read" in fault(examined(run)).says


def test_a_checkpoint_whose_metrics_are_damaged(run):
    file = newest(run) / "metrics" / "metrics"
    file.write_bytes(file.read_bytes()[:7])
    found = fault(examined(run))
    assert "checkpoints/6/metrics/metrics: damaged; it holds no part of the state" in found.says
    assert found.remedy == "delete it"


def test_no_checkpoint_yet(run):
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint" in fault(examined(run)).says


def test_a_checkpoint_of_another_network(run):
    config = load_run(run)[1]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=16))
    assert "does not fit the run's model" in fault(examined(run, config)).says


def test_data_that_was_prepared_again_from_other_files(run):
    note = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps({"images": 99, "checksum": "other"}))
    found = fault(examined(run))
    assert "prepared again, from other files" in found.says
    assert f"(99 images then, {note['images']} now)" in found.says


def test_data_that_was_moved(run, dataset_dir):
    config = load_run(run)[1]
    data = dataclasses.replace(config.data, dir="gone")
    found = examined(run, dataclasses.replace(config, data=data))
    faults = [f for f in found if not f.good]
    assert {f.what for f in faults} == {"squares train", "squares validation"}
    assert all("no prepared data set 'squares' in gone" in f.says for f in faults)
    assert all("`data.dir`" in f.remedy for f in faults)


def test_results_that_cannot_be_written(run):
    (run / "metrics.json.part").mkdir()
    found = fault(examined(run))
    assert "cannot write" in found.says
    assert "metrics.json.part is a directory" in found.says


def test_no_directory_for_the_cache(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GHM_JAX_CACHE", str(tmp_path / "file" / "cache"))
    found = fault(examined(run))
    assert found.what == "cache"
    assert "GHM_JAX_CACHE" in found.remedy


def test_a_platform_that_jax_lacks(run, monkeypatch):
    def none(*args):
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", none)
    faults = [f for f in examined(run) if not f.good]
    assert faults[0].what == "devices"
    assert all("JAX has no device for JAX_PLATFORMS='cuda'" in f.says for f in faults)


def test_shared_memory_that_is_too_small_and_no_semaphores(run, monkeypatch):
    config = load_run(run)[1]
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, workers=2))
    room = SharedMemory(free=10**6, needed=10**9)
    with monkeypatch.context() as patch:
        patch.setattr("ghm_jax.data.workers.shared_memory", lambda *_: room)
        assert "--shm-size" in fault(examined(run, config)).remedy

    def no_context(kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("multiprocessing.get_context", no_context)
    found = fault(examined(run, config))
    assert "no semaphores" in found.says
    assert "`run.workers` 0" in found.remedy


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ("quantized", "is int8, not floating-point: quantized"),
        ("a part", "lacks "),
        (None, "no such file"),
    ],
)
def test_weights_that_a_new_run_could_not_start_from(dataset_dir, tmp_path, tensors, words):
    file = tmp_path / "w.safetensors"
    model = Model(
        backbone="resnet10", width=4, norm="frozen", channels=8, dtype="float32", weights=str(file)
    )
    if tensors is not None:
        blank = build(Config(model=model), 3).abstract_state
        like = {"params": blank.params, "batch_stats": blank.batch_stats}
        like = {kind: {"backbone": tree["backbone"]} for kind, tree in like.items()}
        whole = published_shapes(BACKBONE, like)
        part = list(whole)[:-1] if tensors == "a part" else list(whole)
        kind = np.int8 if tensors == "quantized" else np.float32
        save_file({name: np.zeros(whole[name], kind) for name in part}, file)
    config = tiny_config(dataset_dir, model=model)
    found = fault(f for f in examine(config, "experiment.py") if "(absent)" not in f.says)
    assert found.what == "weights"
    assert "w.safetensors" in found.says
    assert words in found.says
    assert not list(tmp_path.glob("weights*"))  # nothing is cached

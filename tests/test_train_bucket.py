"""A run in a bucket keeps the promises of a run on a disk, with the same bits."""

import contextlib
import json
import signal

import jax
import jax.export
import numpy as np
import pytest
from bucket_emulator import URL, copy_to_bucket
from tiny import Listener, tiny_config

from ghm_jax import cli
from ghm_jax.analysis.gradient_stats import write_stats
from ghm_jax.evaluate import evaluate
from ghm_jax.export import export
from ghm_jax.predict import predict
from ghm_jax.runs.checkpoint import Checkpoints
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.runs.history import read_history
from ghm_jax.storage import as_path
from ghm_jax.train import train
from ghm_jax.training.interrupt import TrainingInterrupted

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]
RUN = f"{URL}/runs/a"


class PowerFailed(BaseException):
    """Ends a job without a word, as SIGKILL does to what it has not written yet."""


def die():
    raise PowerFailed


def assert_same(a, b):
    """Bit for bit the same pytree."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), jax.tree_util.keystr(path))


def told(history):
    """What is not time in records."""
    timed = ("images_per_second", "data_wait", "seconds")
    return [{k: v for k, v in record.items() if k not in timed} for record in history]


@pytest.fixture
def bucket_config(store, dataset_dir, tmp_path, monkeypatch):
    """`tiny_config` with its data in the bucket."""
    monkeypatch.setenv("GHM_JAX_CACHE", str(tmp_path / "cache"))
    return tiny_config(copy_to_bucket(dataset_dir, f"{URL}/data"))


@pytest.fixture
def stopped(bucket_config):
    """A run that was killed in step 5, with the checkpoint of step 3."""
    with pytest.raises(PowerFailed):
        train(bucket_config, RUN, progress=Listener(4, die))
    return RunDirectory(as_path(RUN))


def test_a_kill_and_a_signal_do_not_change_the_result(stopped, store, finished_run, bucket_config):
    whole_run, whole, _ = finished_run
    config = bucket_config
    listener = Listener(4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="stopped at step 5 of 6") as interrupted:
        train(config, RUN, progress=listener)
    assert interrupted.value.preempted
    assert any(f"{RUN}: resuming at step 3" in line for line in listener.lines)
    assert_same(train(config, RUN), whole)
    assert told(read_history(stopped.history)) == told(read_history(whole_run.history))
    with Checkpoints(stopped.checkpoints) as checkpoints:
        assert_same(checkpoints.restore(whole), whole)
    inside = [name for name in store.objects if name.startswith("runs/a/")]
    names = {name.removeprefix("runs/a/").partition("/")[0] for name in inside}
    assert names == {path.name for path in whole_run.path.iterdir()}


def test_every_command_reads_a_run_and_writes_into_a_bucket(
    store, finished_run, bucket_config, dataset_dir, tmp_path, capsys
):
    whole_run, _, _ = finished_run
    train(bucket_config, RUN, profile=(2, 3))
    assert any(name.startswith("runs/a/tensorboard/plugins/profile/") for name in store.objects)
    on_disk, result = evaluate(whole_run.path), evaluate(RUN)
    assert result.metrics == on_disk.metrics
    assert result.unwritten == ""
    assert json.loads(store.objects["runs/a/detections.json"]) == on_disk.detections
    assert b"<html" in store.objects["runs/a/report.html"]
    write_stats(RUN, images=4)
    assert json.loads(store.objects["runs/a/stats.json"])["step"] == 6
    assert store.objects["runs/a/stats_boxes.png"].startswith(b"\x89PNG")
    image = next(dataset_dir.parent.glob("train*.png"))
    predict(RUN, [str(image)], f"{URL}/found")
    assert "found/contact_sheet.jpg" in store.objects
    export(RUN, f"{URL}/program.stablehlo", platforms=("cpu",))
    export(whole_run.path, tmp_path / "program.stablehlo", platforms=("cpu",))
    notes = (tmp_path / "program.stablehlo.json").read_bytes()
    assert store.objects["program.stablehlo.json"] == notes
    program = jax.export.deserialize(bytearray(store.objects["program.stablehlo"]))
    assert program.in_avals[0].shape[0] == json.loads(notes)["batch"]
    with contextlib.suppress(SystemExit):  # a class of the data has no object, which is a fault
        cli.main(["doctor", RUN])
    assert f"checkpoint      {RUN}: has a checkpoint of step 6" in capsys.readouterr().out

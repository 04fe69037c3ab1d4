"""A real job of two processes with four devices each is the run of one process with eight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny import quick_compilation, tiny_config

from ghm_jax.config import Optimizer, Predict, Run
from ghm_jax.evaluate import evaluate
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.storage import as_path
from ghm_jax.train import train

pytestmark = pytest.mark.slow
MAIN = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
from ghm_jax.cli import main
main()
"""
"""The command, without what gloo's threads write to stdout themselves, over each other's lines."""
COMMAND = (sys.executable, "-c", MAIN)


def unused_address():
    """HOST:PORT for the coordinator of a job."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


class Job:
    """Two processes of a command, started in `place`."""

    def __init__(self, place, *args):
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        job = ("--distributed.coordinator", unused_address(), "--distributed.num-processes", "2")
        self.processes = [
            subprocess.Popen(
                [*COMMAND, *args, *job, "--distributed.process-id", str(number)],
                cwd=place,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]

    def end(self, status=0):
        """(stdout, stderr) of both, which end with this status."""
        try:
            outputs = [process.communicate(timeout=600) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        for process, (_, err) in zip(self.processes, outputs, strict=True):
            assert process.returncode == status, err[-3000:]
        return outputs


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_training(alone, job):
    """But for rounding."""
    want, got = (
        restore_state(run, load_run(run.path)[1], jax.devices()[0]) for run in (alone, job)
    )
    assert int(got.step) == 4
    leaves = jax.tree.leaves_with_path(got.params)
    for (path, x), y in zip(leaves, jax.tree.leaves(want.params), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
    for logged, of_one in ((job.history, alone.history), (job.evaluations, alone.evaluations)):
        keys = ("step", "loss_class", "loss_box", "AP", "AP50")
        rows = [[record.get(key, 0) for key in keys] for record in records(logged)]
        want_rows = [[record.get(key, 0) for key in keys] for record in records(of_one)]
        np.testing.assert_allclose(rows, want_rows, rtol=1e-3)


@pytest.fixture(scope="module")
def place(dataset_dir, tmp_path_factory):
    """A directory with an experiment."""
    place = tmp_path_factory.mktemp("job")
    config = tiny_config(
        dataset_dir,
        optimizer=Optimizer(name="sgd", batch_size=8, steps=4, warmup_steps=0),
        predict=Predict(batch_size=8, candidates=20, max_detections=10, score_threshold=0.0),
        run=Run(workers=0, log_every=1, checkpoint_every=4, eval_every=2),
    )
    (place / "tiny.py").write_text("from ghm_jax.config import *\n\nconfig = " + repr(config))
    with quick_compilation():
        train(config, place / "alone")
    return place


@pytest.fixture(scope="module")
def stopped(place):
    """Output of both processes of a training under pmap whose second process got SIGTERM."""
    job, history = Job(place, "train", "tiny.py", "--run-dir", "job"), place / "job/metrics.jsonl"
    while not (history.exists() and history.read_text()):  # then step 2 is evaluated
        if any(process.poll() for process in job.processes):
            break  # `end` shows why
        time.sleep(0.02)
    job.processes[1].send_signal(signal.SIGTERM)
    return job.end()


def test_a_preempted_process_stops_both_with_a_checkpoint(place, stopped):
    (out, err), second = stopped
    assert "new run of 4 steps on 8 cpu devices" in out
    assert "stopped at step 2 of 4, checkpoint written; resume with: the same commands" in err
    assert second == ("", "")  # only the first process prints
    assert RunDirectory(place / "job").has_checkpoint


@pytest.fixture(scope="module")
def resumed(place, stopped):
    """Output of both processes that resumed the training, under shard_map."""
    return Job(place, "train", "tiny.py", "--run-dir", "job", "--run.wrapper", "shard_map").end()


def test_two_processes_train_what_one_process_trains(place, resumed):
    (out, _), second = resumed
    assert "resuming at step 2 of 4 steps on 8 cpu devices" in out
    assert second == ("", "")
    assert_same_training(RunDirectory(place / "alone"), RunDirectory(place / "job"))


def test_two_processes_find_what_one_process_finds(place, resumed):
    run = RunDirectory(place / "job")
    with quick_compilation():
        want = evaluate(run.path)
    detections = json.loads(run.detections.read_text())
    run.detections.unlink()
    (out, _), second = Job(place, "evaluate", "job").end()
    assert "report: job/report.html" in out
    assert second == ("", "")
    assert json.loads(run.metrics.read_text()) == want.summary()
    by_image = [[], []]
    for rows, found in zip(
        by_image, (detections, json.loads(run.detections.read_text())), strict=True
    ):
        assert len({row["image_id"] for row in found}) == 6
        rows += sorted((r["image_id"], r["score"], r["category_id"], *r["bbox"]) for r in found)
    np.testing.assert_allclose(*by_image, rtol=1e-4, atol=2e-3)


def test_a_user_error_is_one_line_from_the_first_process(place):
    job = Job(place, "train", "tiny.py", "--run-dir", "new", "--optimizer.batch-size", "12")
    (_, err), second = job.end(1)
    assert err.startswith("ghm-jax: optimizer.batch_size: 12 images cannot be split over 8 devices")
    assert err.count("\n") == 1
    assert second == ("", "")
    assert not (place / "new").exists()


def test_a_bucket_can_be_all_that_they_share(place, dataset_dir, tmp_path, monkeypatch):
    bucket = pytest.importorskip("bucket_emulator")
    monkeypatch.setenv("GHM_JAX_CACHE", str(tmp_path))
    with bucket.running_store() as store:
        data = bucket.copy_to_bucket(dataset_dir, f"{bucket.URL}/data")
        outputs = Job(
            place, "train", "tiny.py", "--run-dir", f"{bucket.URL}/job", "--data.dir", data
        ).end()
        assert f"{bucket.URL}/job: new run of 4 steps on 8 cpu devices" in outputs[0][0]
        assert "job/training.lock" not in store.objects
        assert_same_training(
            RunDirectory(place / "alone"), RunDirectory(as_path(f"{bucket.URL}/job"))
        )
        assert not (place / "gs:").exists()


SLOW = """
import sys, time
from ghm_jax.distributed.processes import raise_together, start_processes
start_processes(sys.argv[1], 2, int(sys.argv[2]))
import jax
jax.devices()
with raise_together():
    time.sleep(35 * int(sys.argv[2]))  # longer than a computation on CPUs would wait
print("together")
"""


def test_a_process_that_takes_its_time_is_waited_for():
    address = unused_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, address, str(number)], stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(output.endswith("together\n") for output in outputs)

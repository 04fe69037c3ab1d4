"""A real job of two processes, as on two hosts, is the run of one process."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ghm_jax.config import Optimizer, Predict, Run
from ghm_jax.inference import restore_state
from ghm_jax.rundir import RunDirectory, load_run
from ghm_jax.train import train

COMMAND = (sys.executable, "-c", "from ghm_jax.cli import main; main()")


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_job(place, *settings):
    """Two processes of four devices each, to their end; what each said."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    job = ("--distributed.coordinator", f"localhost:{free_port()}")
    job += ("--distributed.num-processes", "2", "--distributed.process-id")
    processes = [
        subprocess.Popen(
            [*COMMAND, "train", "job.py", *settings, *job, str(number)],
            cwd=place,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in said]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_and_resume_what_one_process_trains(
    dataset_dir, tmp_path, quick_compilation
):
    config = tiny_config(
        dataset_dir,
        optimizer=Optimizer(name="sgd", batch_size=8, steps=4, warmup_steps=0),
        predict=Predict(batch_size=8, candidates=20, max_detections=10),
        run=Run(workers=0, log_every=1, checkpoint_every=2, eval_every=4),
    )
    experiment = "from ghm_jax.config import *\n\nconfig = " + repr(config)
    (tmp_path / "job.py").write_text(experiment)
    whole = train(config, tmp_path / "alone")
    alone, job = RunDirectory(tmp_path / "alone"), RunDirectory(tmp_path / "job")

    def check(said, start):
        first, second = said
        assert f"{start} of 4 steps on 8 cpu devices" in first
        assert "cpu device" not in second  # the first one speaks
        state = restore_state(job, load_run(job.path)[1], jax.devices()[0])
        assert int(state.step) == 4
        leaves = jax.tree.leaves_with_path(state.params)
        for (path, x), y in zip(leaves, jax.tree.leaves(whole.params), strict=True):
            name = jax.tree_util.keystr(path)
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
        steps = [record["step"] for record in records(job.history)]
        assert steps == [record["step"] for record in records(alone.history)]
        assert len(records(job.evaluations)) == 1

    check(run_job(tmp_path, "--run-dir", "job"), "new run")
    shutil.rmtree(job.checkpoints / "4")
    sharded = run_job(tmp_path, "--run-dir", "job", "--run.wrapper", "shard_map")
    check(sharded, "resuming at step 2")

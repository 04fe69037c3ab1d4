"""Training end to end on a tiny data set: what it writes, how it stops and resumes."""

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Listener, tiny_config

from ghm_jax.config import from_dict
from ghm_jax.evaluate import evaluate
from ghm_jax.evaluation.coco import METRICS
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.checkpoint import CheckpointFailed, Checkpoints
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.train import train
from ghm_jax.training.interrupt import TrainingInterrupted, stop_on_signal
from ghm_jax.training.log import TrainingDiverged, what_is_wrong
from ghm_jax.training.saving import Saver
from ghm_jax.training.state import init_state
from ghm_jax.training.step import train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def records(run):
    return [json.loads(line) for line in run.history.read_text().splitlines()]


def assert_same(a, b):
    """Bit for bit the same pytree."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), jax.tree_util.keystr(path))


def test_a_run_writes_its_config_log_and_checkpoint(finished_run, dataset_dir):
    run, state, _ = finished_run
    assert int(state.step) == 6
    with Checkpoints(run.checkpoints) as checkpoints:
        assert checkpoints.latest == 6
    saved = from_dict(json.loads(run.config.read_text()))
    assert saved.data.classes == ("dark", "light", "absent")  # resolved from the data set
    assert dataclasses.replace(saved.data, classes=()) == tiny_config(dataset_dir).data
    assert list(run.tensorboard.glob("events.out.tfevents.*"))


def test_every_step_is_logged_with_the_rate_and_the_histograms(finished_run):
    run, _, listener = finished_run
    history = records(run)
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5, 6] == listener.steps
    # Two steps of warm-up from a third of the peak, then half a cosine in four steps.
    rates = [3e-3 * (1 / 3), 3e-3 * (2 / 3)]
    rates += [3e-3 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    np.testing.assert_allclose([record["learning_rate"] for record in history], rates, rtol=1e-5)
    assert all(np.diff([record["seconds"] for record in history]) > 0)
    for record in history:
        assert len(record["ghm_c"]["counts"]) == len(record["ghm_c"]["weights"]) == 10
        assert len(record["ghm_r"]["counts"]) == 5
        assert record["num_nonfinite"] == 0
        assert 0 <= record["data_wait"] <= 1
        assert "mfu" not in record  # a CPU's peak is not published


def test_the_step_is_compiled_once(finished_run):
    _, _, listener = finished_run
    assert any("compiling the training step" in line for line in listener.lines)
    assert not any("warning: compiling" in line for line in listener.lines)


@pytest.mark.slow
def test_options_on_number_types_do_not_change_a_run(
    finished_run, dataset_dir, tmp_path, number_types
):
    del number_types
    state, same = train(tiny_config(dataset_dir), tmp_path / "run"), finished_run[1]
    for (path, x), y in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(same), strict=True):
        where = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, where
        # Rounding may differ, and AdamW makes a whole step of a gradient near zero.
        x, y = np.float64(x), np.float64(y)
        assert np.abs(x - y).max(initial=0) <= 1e-3 * np.abs(y).max(initial=0) + 1e-5, where


def test_a_complete_run_is_not_changed(finished_run, dataset_dir):
    run, state, _ = finished_run
    before = {p: p.read_bytes() for p in (run.history, run.config)}
    listener = Listener()
    assert_same(train(tiny_config(dataset_dir), run.path, progress=listener), state)
    assert "complete at step 6" in listener.lines[-1]
    assert {p: p.read_bytes() for p in before} == before


def test_a_crash_and_a_signal_do_not_change_the_result(finished_run, dataset_dir, tmp_path):
    whole_run, whole, _ = finished_run
    config, run = tiny_config(dataset_dir), RunDirectory(tmp_path / "run")

    def crash():
        raise RuntimeError("the power failed")

    with pytest.raises(RuntimeError, match="the power failed"):
        train(config, run.path, progress=Listener(4, crash))  # step 5 is done, step 3 saved

    # Ctrl-C during step 5: the step is finished, saved and logged.
    listener = Listener(4, lambda: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="stopped at step 5 of 6") as stopped:
        train(config, run.path, progress=listener)
    assert "\n" not in str(stopped.value)
    assert signal.getsignal(signal.SIGINT) is before
    assert any("resuming at step 3" in line for line in listener.lines)
    with Checkpoints(run.checkpoints) as checkpoints:
        assert checkpoints.latest == 5

    listener = Listener()
    resumed = train(config, run.path, progress=listener)
    assert listener.steps == [6]
    assert_same(resumed, whole)

    timeless = {"seconds", "images_per_second", "data_wait"}
    for a, b in zip(records(run), records(whole_run), strict=True):
        assert {k: v for k, v in a.items() if k not in timeless} == {
            k: v for k, v in b.items() if k not in timeless
        }


def test_a_run_is_trained_by_one_job_at_a_time(finished_run, dataset_dir, tmp_path):
    config, run = tiny_config(dataset_dir), RunDirectory(tmp_path / "run")
    refused = []

    def start_again():
        for restart in (False, True):
            with pytest.raises(ConfigError, match=r"is being trained by process \d+") as error:
                train(config, run.path, restart=restart)
            refused.append(str(error.value))
        deadline = time.monotonic() + 30
        while not run.has_checkpoint and time.monotonic() < deadline:  # saved in the background
            time.sleep(0.01)
        assert evaluate(run.path).step == 3  # what reads a run needs no lock

    listener = Listener(4, start_again)
    assert_same(train(config, run.path, progress=listener), finished_run[1])
    assert len(refused) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list(run.path.glob("*lock*"))


def test_data_that_was_prepared_again_from_other_files_is_said(dataset_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(dataset_dir, data)
    config = tiny_config(data)
    for lines, step in (("new", 1), ("again", 3), ("other", 5)):  # stops one step later
        if lines == "other":  # as if another file had been annotated
            (info,) = data.rglob("metadata.json")
            info.write_text(info.read_text().replace('"annotations": "', '"annotations": "0'))
        listener = Listener(step, lambda: signal.raise_signal(signal.SIGTERM))
        with contextlib.suppress(TrainingInterrupted):
            train(config, tmp_path / "run", progress=listener)
        warned = [line for line in listener.lines if "prepared again" in line]
        assert len(warned) == (lines == "other")


def test_a_run_keeps_the_name_of_the_only_data_set(dataset_dir, tmp_path):
    """There may be several by the time the run is evaluated, and category ids are part of one."""
    config, run = tiny_config(dataset_dir), RunDirectory(tmp_path / "run")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, name=""),
        optimizer=dataclasses.replace(config.optimizer, steps=2),
    )
    train(config, run.path)
    assert json.loads(run.config.read_text())["data"]["name"] == "squares"
    listener = Listener()
    train(config, run.path, progress=listener)
    assert any("complete at step 2" in line for line in listener.lines)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_run_resumes_with_another_number_of_devices(finished_run, dataset_dir, tmp_path, devices):
    config, run = tiny_config(dataset_dir), RunDirectory(tmp_path / "run")
    listener = Listener(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="step 3 of 6") as stopped:
        train(config, run.path, progress=listener)
    assert stopped.value.preempted
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, devices=devices))
    resumed, whole = train(config, run.path), finished_run[1]
    for x, y in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_a_damaged_checkpoint_costs_only_the_steps_after_the_previous_one(
    finished_run, dataset_dir, tmp_path
):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished_run[0].path, run.path)
    (data,) = (run.checkpoints / "6" / "default" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:100])
    listener = Listener()
    state = train(tiny_config(dataset_dir), run.path, progress=listener)
    assert listener.steps == [4, 5, 6]
    assert any("skipped the checkpoint of step 6" in line for line in listener.lines)
    assert_same(state, finished_run[1])
    assert {p.name for p in run.checkpoints.iterdir()} == {"3", "6", "6.damaged"}


@pytest.mark.parametrize("content", [b"", b'{"AP": 0', b"[]"])
@pytest.mark.parametrize("note", ["metrics/metrics", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_whose_notes_are_damaged_is_resumed(
    finished_run, dataset_dir, tmp_path, note, content
):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished_run[0].path, run.path)
    shutil.rmtree(run.checkpoints / "6")
    (run.checkpoints / "3" / note).write_bytes(content)
    listener = Listener()
    state = train(tiny_config(dataset_dir), run.path, progress=listener)
    assert listener.steps == [4, 5, 6]
    assert any(f"checkpoints/3/{note}: damaged, moved to" in line for line in listener.lines)
    assert_same(state, finished_run[1])


def test_evaluation_during_training_changes_nothing_but_keeps_the_best(
    finished_run, dataset_dir, tmp_path
):
    config, run = tiny_config(dataset_dir), RunDirectory(tmp_path / "run")
    settings = dataclasses.replace(config.run, eval_every=2, keep=1, checkpoint_every=100)
    listener = Listener()
    state = train(dataclasses.replace(config, run=settings), run.path, progress=listener)
    assert_same(state, finished_run[1])
    scores = [json.loads(line) for line in run.evaluations.read_text().splitlines()]
    assert [score["step"] for score in scores] == [2, 4, 6]
    assert all(METRICS.keys() < score.keys() for score in scores)
    assert sum("on the validation split" in line for line in listener.lines) == 3
    best = max(score["AP"] for score in scores)
    kept = {int(path.name) for path in run.checkpoints.iterdir()}
    assert 6 in kept
    assert len(kept) <= 2
    assert any(score["AP"] == best and score["step"] in kept for score in scores)


# Orbax's threads end with the error as well, which pytest would report.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_training_survives_a_disk_that_is_full_temporarily(
    finished_run, dataset_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("ghm_jax.training.saving.time.sleep", lambda seconds: None)
    config, run = tiny_config(dataset_dir), RunDirectory(tmp_path / "run")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Disk(Listener):
        """Full from the update of step 1 until a checkpoint could not be written."""

        def update(self, name, done, total, fields):
            super().update(name, done, total, fields)
            if done == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))

        def say(self, line):
            super().say(line)
            if "could not be written" in line or "could not be saved" in line:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)

    listener = Disk()
    try:
        state = train(config, run.path, progress=listener)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert_same(state, finished_run[1])
    assert any(
        "could not be written" in line or "could not be saved" in line for line in listener.lines
    )
    assert any("metrics.jsonl: cannot be written" in line for line in listener.lines)
    with Checkpoints(run.checkpoints) as checkpoints:
        assert_same(checkpoints.restore(state), state)


def test_a_last_state_that_cannot_be_saved_is_one_line_with_the_remedy(tmp_path):
    class Full:
        latest = 3

        def save(self, step, state):
            raise CheckpointFailed("OSError: no space")

    listener = Listener()
    with pytest.raises(
        CheckpointFailed, match=r"step 6 .*no space.*step 3: free some space"
    ) as failed:
        Saver(Full(), listener, every=1, retry_after=1).save_last(6, None, pause=0.0)
    assert len(listener.lines) == 2
    assert "\n" not in str(failed.value)


def test_a_second_interrupt_stops_immediately():
    listener = Listener()
    with stop_on_signal(listener) as stopping:
        assert not stopping.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(listener.lines) == 1


def test_another_config_is_refused_and_restart_moves_the_old_run_aside(
    finished_run, dataset_dir, tmp_path
):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished_run[0].path, run.path)
    other = dataclasses.replace(tiny_config(dataset_dir), seed=1)
    before = run.config.read_text()
    with pytest.raises(ConfigError, match=r"seed 0, not 1.*`restart`"):
        train(other, run.path)
    assert run.config.read_text() == before

    listener = Listener(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted):
        train(other, run.path, restart=True, progress=listener)
    (old,) = (path for path in tmp_path.iterdir() if path != run.path)
    assert str(old) in listener.lines[0]
    assert (old / "config.json").read_text() == before
    assert json.loads(run.config.read_text())["seed"] == 1
    assert [record["step"] for record in records(run)] == [1, 2]


def test_a_run_that_diverges_says_what_is_wrong_in_one_line(dataset_dir, tmp_path, monkeypatch):
    def broken_state(*args):
        state = init_state(*args)
        return state._replace(params=jax.tree.map(lambda p: p + jnp.nan, state.params))

    config = tiny_config(dataset_dir)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, max_skipped=3))
    monkeypatch.setattr("ghm_jax.training.build.init_state", broken_state)
    listener = Listener()
    with pytest.raises(TrainingDiverged) as diverged:
        train(config, tmp_path / "run", progress=listener)
    assert re.fullmatch(
        r"step 3: skipped 3 updates \(3 consecutive\): NaN or Inf in the network's outputs for "
        r"images \d+(, \d+){3}; lower `optimizer.learning_rate` .* and `restart` "
        r"\(there is no checkpoint\)",
        str(diverged.value),
    )
    warnings = [line for line in listener.lines if line.startswith("warning: step")]
    assert [line.split(" (")[0] for line in warnings] == [
        "warning: step 1: skipped 1 update",
        "warning: step 2: skipped 2 updates",
    ]


def test_a_batch_with_nan_costs_one_update(dataset_dir, tmp_path, monkeypatch):
    def fragile_step(state, batch, **how):
        """As if the network failed on the batch of step 2."""
        poison = jnp.where(state.step == 2, jnp.nan, 0.0)
        poisoned = state._replace(params=jax.tree.map(lambda p: p + poison, state.params))
        after, metrics = train_step(poisoned, batch, **how)
        return after._replace(
            params=jax.tree.map(
                lambda new, old: jnp.where(state.step == 2, old, new), after.params, state.params
            )
        ), metrics

    monkeypatch.setattr("ghm_jax.training.build.train_step", fragile_step)
    listener = Listener()
    state = train(tiny_config(dataset_dir), tmp_path / "run", progress=listener)
    assert int(state.step) == 6
    assert state.skipped == (1, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    (warning,) = (line for line in listener.lines if line.startswith("warning: step"))
    assert warning.startswith("warning: step 3: skipped 1 update (1 consecutive): ")
    written = records(RunDirectory(tmp_path / "run"))
    assert [record["step"] for record in written] == [1, 2, 4, 5, 6]
    assert [record["skipped"] for record in written] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        ({"loss_box": np.inf}, [], "NaN or Inf in loss_box"),
        ({"loss_class": np.nan, "loss_box": np.nan}, [], "NaN or Inf in loss_class and loss_box"),
        ({"grad_norm": np.inf}, [], "NaN or Inf in the gradient, not in the loss"),
        ({"num_nonfinite": 4}, [7], "NaN or Inf in the network's outputs for image 7"),
        (
            {"num_nonfinite": 4},
            list(range(1, 9)),
            "NaN or Inf in the network's outputs for images 1, 2, 3, 4, 5 and 3 more",
        ),
        (
            {"grad_norm": np.inf, "ghm_c": {"weights": [0.5, 1.0, 31234.0]}},
            [],
            "NaN or Inf in the gradient, not in the loss, ghm_c weights bin 2 of 3 by 3.12e+04",
        ),
    ],
)
def test_the_loss_the_bin_and_the_images_with_nan_are_named(changes, images, message):
    values = {"loss_class": 1.0, "loss_box": 0.1, "grad_norm": 2.0, "num_nonfinite": 0}
    assert what_is_wrong({**values, **changes}, images) == message


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        ("data", {"dir": "nowhere"}, "data.dir"),
        ("data", {"train_split": "test"}, "data.train_split"),
        ("optimizer", {"batch_size": 3}, "optimizer.batch_size"),
        ("model", {"backbone": "resnet51"}, "model.backbone"),
    ],
)
def test_user_errors_are_found_before_anything_is_written(
    dataset_dir, tmp_path, section, changes, key
):
    config = tiny_config(dataset_dir)
    changed = dataclasses.replace(getattr(config, section), **changes)
    with pytest.raises(ConfigError, match=rf"^{key}: ") as refused:
        train(dataclasses.replace(config, **{section: changed}), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())

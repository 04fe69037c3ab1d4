"""One job at a time trains in a run's directory in a bucket, and nothing there is overwritten."""

import dataclasses
import json
import time

import pytest
from bucket_emulator import URL

from ghm_jax import storage
from ghm_jax.config import Config, Optimizer
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs import lock
from ghm_jax.runs.directory import claim_run
from ghm_jax.runs.lock import LOCK, SILENCE, describe_lock, lock_directory

RUN = f"{URL}/runs/a"


@pytest.fixture
def directory(store):
    del store
    return storage.as_path(RUN)


def elsewhere(directory):
    """A lock of a process of another machine, written now."""
    holder = lock._this_process()._replace(host="other", pid=1, place="other")
    (directory / LOCK).write_text(json.dumps(holder._asdict()))


def later(monkeypatch, seconds):
    """Lets the clock of the bucket be that much further."""
    usual = storage.now_at
    monkeypatch.setattr(lock, "now_at", lambda file: usual(file) + seconds)


def test_a_second_job_is_refused_until_the_first_one_ends(directory, store):
    with claim_run(RUN, Config()):
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"{RUN}: is being trained by process"):
                claim_run(RUN, Config()).__enter__()
    assert list(store.objects) == ["runs/a/config.json"]
    with claim_run(RUN, Config()):
        assert (directory / LOCK).exists()


def test_the_lock_of_another_machine_is_taken_over_after_a_silence(directory, store, monkeypatch):
    elsewhere(directory)
    with pytest.raises(ConfigError, match=r"trained by process 1 on other \(last sign of life"):
        lock_directory(directory, pytest.fail).__enter__()
    assert list(store.objects) == [f"runs/a/{LOCK}"]
    later(monkeypatch, SILENCE + 1)
    said = []
    with lock_directory(directory, said.append):
        assert describe_lock(directory)[0]
    assert len(said) == 1
    assert "took over the stale lock of process 1 on other" in said[0]
    assert not store.objects


def test_a_lock_is_renewed(directory, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.05)
    with lock_directory(directory, pytest.fail) as held:
        first = held.file.stat().st_mtime
        limit = time.monotonic() + 20
        while held.file.stat().st_mtime <= first:
            assert time.monotonic() < limit


def test_a_run_of_another_config_is_refused_and_left_as_it_is(store):
    with claim_run(RUN, Config()):
        pass
    before = store.objects
    other = dataclasses.replace(Config(), optimizer=Optimizer(learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"was started with optimizer.learning_rate .* not 0.5"):
        claim_run(RUN, other).__enter__()
    assert store.objects == before


def test_something_else_is_not_overwritten(directory, store):
    (directory / "photo.png").write_bytes(b"1")
    with pytest.raises(ConfigError, match="exists and is not a run"):
        claim_run(RUN, Config()).__enter__()
    assert store.objects == {"runs/a/photo.png": b"1"}


def test_a_restart_moves_the_whole_run_aside(directory, store):
    with claim_run(RUN, Config()):
        (directory / "checkpoints" / "3" / "data").write_bytes(b"3")
    before = store.objects
    other, said = dataclasses.replace(Config(), optimizer=Optimizer(learning_rate=0.5)), []
    with claim_run(RUN, other, restart=True, say=said.append):
        aside = said[0].removeprefix("moved the old run to ").removeprefix(f"{URL}/")
        moved = {n: data for n, data in store.objects.items() if n.startswith(aside)}
        assert {n.replace(aside, "runs/a"): data for n, data in moved.items()} == before
        assert not (directory / "checkpoints").exists()


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_restart_that_was_killed_leaves_the_old_run_whole_or_no_run(
    directory, store, monkeypatch, removed
):
    """It is never taken for a run that can be resumed, or for one without checkpoints."""
    with claim_run(RUN, Config()):
        for step in (3, 6):
            (directory / "checkpoints" / str(step) / "commit_success.txt").write_bytes(b"3")
    usual, removals = type(directory).unlink, []

    def killed(path, missing_ok=False):
        if path.name != LOCK and len(removals) == removed:
            raise KeyboardInterrupt
        removals.append(path)
        usual(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(type(directory), "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            claim_run(RUN, Config(), restart=True).__enter__()
    if removed == 0:
        with claim_run(RUN, Config()):
            assert (directory / "checkpoints" / "6").exists()
    else:
        with pytest.raises(ConfigError, match="exists and is not a run"):
            claim_run(RUN, Config()).__enter__()
    with claim_run(RUN, Config(), restart=True):
        assert not (directory / "checkpoints").exists()
    assert sum(n.endswith("/checkpoints/6/commit_success.txt") for n in store.objects) >= 1


def test_a_bucket_that_cannot_be_written_is_one_line(directory, store):
    with claim_run(RUN, Config()):
        pass
    store.faults.every, store.faults.status = 1, 403
    with pytest.raises(
        ConfigError, match=f"{RUN}: cannot be written .*Forbidden.*; choose"
    ) as said:
        claim_run(RUN, Config()).__enter__()
    assert "\n" not in str(said.value)

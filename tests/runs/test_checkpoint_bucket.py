"""Checkpoints in a bucket, where a save is many objects and nothing can be renamed."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket_emulator import BUCKET, URL

from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.checkpoint import Checkpoints, check_location, complete_steps
from ghm_jax.storage import as_path, telling_of_retries

PREFIX = "runs/a/checkpoints"


class State(NamedTuple):
    """A state with arrays of several kinds; the large one lies in a file of its own."""

    step: Any
    params: Any


def make_state(step):
    return State(
        step=jnp.int32(step),
        params={"large": jnp.arange(3000, dtype=jnp.float32) + step, "small": jnp.ones(3) / step},
    )


LIKE = make_state(1)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def directory(store):
    del store
    return as_path(f"{URL}/{PREFIX}")


def test_checkpoints_copied_from_a_bucket_to_a_disk_are_restored(three, tmp_path):
    for found in three.objects():
        copy = tmp_path / str(found).removeprefix(f"{three}/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(found.read_bytes())
    state, said = restored(tmp_path)
    assert_same(state, make_state(3))
    assert not said


@pytest.fixture
def three(directory):
    """The directory with the checkpoints of steps 1 to 3."""
    save(directory, {1: None, 2: None, 3: None}, keep=3)
    return directory


def save(directory, aps, **keep):
    with Checkpoints(directory, **keep) as checkpoints:
        for step, ap in aps.items():
            checkpoints.save(step, make_state(step), ap)
            checkpoints.wait()


def restored(directory):
    """The newest state, None if the directory is refused, and what was said."""
    said = []
    try:
        with Checkpoints(directory, 3) as checkpoints:
            return checkpoints.restore(LIKE, skipped=lambda _, why: said.append(why)), said
    except ConfigError as error:
        return None, [str(error)]


def test_the_newest_and_the_best_are_kept(directory, store):
    save(directory, {1: 0.1, 2: 0.9, 3: 0.5, 4: None, 5: 0.2, 6: None}, keep=2, keep_best=1)
    assert complete_steps(directory) == [2, 5, 6]
    assert {name.split("/")[3] for name in store.objects} == {"2", "5", "6"}
    with Checkpoints(directory, 2, 1) as checkpoints:
        assert checkpoints.steps == [2, 5, 6]
        assert_same(checkpoints.restore(LIKE), make_state(6))


def test_a_directory_without_checkpoints_can_be_opened_again(directory):
    for _ in range(2):
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.latest is None
            with pytest.raises(ConfigError, match="no checkpoint"):
                checkpoints.restore(LIKE)


def test_what_another_process_removes_is_seen_at_once(three, store):
    assert int(restored(three)[0].step) == 3
    with store.lock:
        store.storage.delete_file(BUCKET, f"{PREFIX}/3/commit_success.txt")
    state, said = restored(three)
    assert_same(state, make_state(2))
    assert not said


def test_whatever_object_is_damaged_the_one_before_is_restored(three, store, rng):
    newest = {n: data for n, data in store.objects.items() if n.startswith(f"{PREFIX}/3/") and data}
    assert len(newest) >= 6
    for name, data in newest.items():
        path = as_path(f"{URL}/{name}")
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] ^= 1
        bad = (bytes(changed), data[: len(data) // 2], None)[rng.integers(3)]
        path.unlink() if bad is None else path.write_bytes(bad)
        found, said = restored(three)
        if found is None:  # a note about the checkpoint, which Orbax reads first
            assert name in said[0]
        else:  # the state of step 3 if nothing of it is in this object
            assert_same(found, make_state(2 if said else int(found.step)))
            assert int(found.step) == 3 or said or name == f"{PREFIX}/3/commit_success.txt"
        path.write_bytes(data)


def test_a_damaged_checkpoint_is_moved_and_its_step_saved_again(three, store):
    name = next(n for n, d in store.objects.items() if n.startswith(f"{PREFIX}/3/default/d/"))
    as_path(f"{URL}/{name}").write_bytes(b"")
    with Checkpoints(three, 3) as checkpoints:
        assert int(checkpoints.restore(LIKE).step) == 2
        before = {n.replace("/3/", "/3.damaged/") for n in store.objects if f"{PREFIX}/3/" in n}
        assert checkpoints.set_aside(3) == three / "3.damaged"
        assert before <= store.objects.keys()
        assert checkpoints.steps == [1, 2]
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
        assert_same(checkpoints.restore(LIKE), make_state(3))


@pytest.mark.parametrize("objects", [1, 4, -1])
def test_what_a_killed_save_left_is_no_checkpoint_and_is_removed(three, store, objects):
    names = [n for n in store.objects if n.startswith(f"{PREFIX}/3/")]
    last = f"{PREFIX}/3/commit_success.txt"  # is written last
    names.remove(last)
    as_path(f"{URL}/{last}").unlink()
    for name in names[objects:]:
        as_path(f"{URL}/{name}").unlink()
    with Checkpoints(three, 3) as checkpoints:
        assert checkpoints.latest == 2
        checkpoints.remove_fragments()
        assert not any(n.startswith(f"{PREFIX}/3/") for n in store.objects)
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
        assert_same(checkpoints.restore(LIKE), make_state(3))


def test_a_bucket_that_hides_a_checkpoint_is_an_error(three, store, monkeypatch):
    """Orbax takes an object that it cannot ask for as missing: the run would start again."""
    from orbax.checkpoint._src.path import step as step_lib

    hidden = as_path(f"{URL}/{PREFIX}/3")
    usual = step_lib._StandardNameFormat._glob_step_paths
    monkeypatch.setattr(
        step_lib._StandardNameFormat,
        "_glob_step_paths",
        lambda *args: [path for path in usual(*args) if str(path) != str(hidden)],
    )
    with pytest.raises(ConfigError, match="2 of 3 checkpoints can be seen; try again"):
        Checkpoints(three, 3)
    assert json.loads(store.objects[f"{PREFIX}/3/metrics/metrics"])["AP"] == -1


@pytest.mark.parametrize("name", ["a*", "b[1]", "c?"])
def test_a_name_that_cannot_be_listed_is_refused(store, name):
    del store
    with pytest.raises(ConfigError, match="could not be read back from"):
        check_location(as_path(f"{URL}/{name}"))
    check_location(as_path(f"{URL}/runs/a"))


@pytest.mark.slow
@pytest.mark.parametrize("status", [503, 0])
def test_a_bucket_that_fails_one_request_in_ten_keeps_every_checkpoint(directory, store, status):
    said = []
    with Checkpoints(directory, 3) as checkpoints, telling_of_retries(directory, said.append):
        store.faults.every, store.faults.status = 10, status
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        assert_same(checkpoints.restore(LIKE), make_state(2))
        assert complete_steps(directory) == [2]
    assert store.faults.failed > 5
    assert len(said) <= 1
    if status:  # a broken connection is repeated below gcsfs as well, which is not told
        assert "they are repeated" in said[0]

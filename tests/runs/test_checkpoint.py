"""What is restored is what was saved, bit for bit; what cannot be restored is one line."""

import contextlib
import gc
import json
import os
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ghm_jax import losses
from ghm_jax.config import Config, Optimizer
from ghm_jax.detection.loss import GHMStates
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.checkpoint import (
    CheckpointFailed,
    Checkpoints,
    check_location,
    restore_tree,
    save_tree,
)
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.state import Skipped, TrainState

# A state needs no network: this one has every kind of leaf, with names out of alphabetical order.


def make_state(rng, width=3, optimizer=None):
    optimizer = optimizer or make_optimizer(Config(optimizer=Optimizer(name="adamw")))
    params = {
        "z": {"kernel": rng.normal(size=(2, width)), "bias": rng.normal(size=width)},
        "a": {"kernel": rng.normal(size=(width, 1))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    ghm = losses.GHMState(jnp.asarray(rng.uniform(size=30), jnp.float32), jnp.array(7, jnp.int32))
    return TrainState(
        step=jnp.array(7, jnp.int32),
        params=optax.apply_updates(params, updates),
        batch_stats={"norm": {"mean": jnp.asarray(rng.normal(size=width), jnp.float32)}},
        opt_state=state,
        ghm=GHMStates(ghm, losses.init_ghm_state(10)),
        ema_params=None,
        skipped=Skipped(jnp.array(3, jnp.int32), jnp.array(0, jnp.int32)),
    )


def blank(state):
    return jax.tree.map(jnp.zeros_like, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_state_is_restored_bit_for_bit(rng, tmp_path, name):
    state = make_state(rng, optimizer=make_optimizer(Config(optimizer=Optimizer(name=name))))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(7, state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest == 7
        assert_same(checkpoints.restore(blank(state)), state)


def test_shapes_and_a_device_are_enough_to_restore(rng, tmp_path):
    state, device = make_state(rng), jax.devices()[3]
    place = jax.sharding.SingleDeviceSharding(device)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(7, state)
        checkpoints.wait()
        restored = checkpoints.restore(like)
    assert_same(restored, state)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(restored))


def test_the_newest_ones_are_kept(rng, tmp_path):
    states = [make_state(rng) for _ in range(4)]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number, state in enumerate(states, 1):
            checkpoints.save(10 * number, state)
        checkpoints.wait()
        assert checkpoints.latest == 40
        assert_same(checkpoints.restore(blank(states[0])), states[-1])
    assert {path.name for path in tmp_path.iterdir()} == {"30", "40"}


def test_a_step_is_saved_once(rng, tmp_path):
    first, second = make_state(rng), make_state(rng)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, first)
        checkpoints.save(7, second)
        checkpoints.wait()
        assert_same(checkpoints.restore(blank(first)), first)


def test_another_model_is_refused_in_one_line(rng, tmp_path):
    state = make_state(rng)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state)
        checkpoints.wait()
        others = [
            make_state(rng, width=4),
            state._replace(params={"z": state.params["z"]}),
            state._replace(params={**state.params, "new": {"kernel": jnp.zeros(3)}}),
            make_state(rng, optimizer=make_optimizer(Config(optimizer=Optimizer(name="sgd")))),
        ]
        for other in others:
            with pytest.raises(ConfigError, match="does not fit") as refused:
                checkpoints.restore(other)
            assert "\n" not in str(refused.value)
            assert str(tmp_path) in str(refused.value)
        assert_same(checkpoints.restore(blank(state)), state)


def test_without_a_checkpoint_the_remedy_is_named(rng, tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ConfigError, match="no checkpoint; train the run first"),
    ):
        checkpoints.restore(make_state(rng))


def test_an_interrupted_save_is_not_taken_for_a_checkpoint(rng, tmp_path):
    state = make_state(rng)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state)
    # Orbax writes under another name and renames it at the end; so a crash leaves these.
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "9.orbax-checkpoint-tmp" / "default").mkdir()
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 7
        assert_same(checkpoints.restore(blank(state)), state)


def test_the_best_ones_are_kept_beside_the_newest(rng, tmp_path):
    states = [make_state(rng) for _ in range(5)]
    aps = [0.1, 0.4, None, 0.3, 0.2]
    with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:
        for step, (state, ap) in enumerate(zip(states, aps, strict=True)):
            checkpoints.save(step, state, ap)
        checkpoints.wait()
        assert checkpoints.steps == [1, 3, 4]
        assert checkpoints.latest == 4
    with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:  # AP is stored as well
        checkpoints.save(5, states[0], 0.35)
        checkpoints.wait()
        assert checkpoints.steps == [1, 5]


def damage(path, how):
    whole = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "flipped":
            path.write_bytes(bytes(byte ^ 1 for byte in whole))


@pytest.mark.parametrize("how", ["truncated", "empty", "gone", "flipped"])
def test_a_damaged_checkpoint_is_skipped_and_can_be_set_aside(rng, tmp_path, how):
    old, new = make_state(rng), make_state(rng)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, old)
        checkpoints.save(9, new)
    (data,) = (tmp_path / "9" / "default" / "d").iterdir()
    damage(data, how)
    skipped = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(blank(old), skipped=lambda *what: skipped.append(what))
        assert_same(restored, old)
        ((step, why),) = skipped
        assert step == 9
        assert "\n" not in why
        assert checkpoints.set_aside(9).is_dir()
        assert checkpoints.latest == 7
        checkpoints.save(9, new)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(blank(new)), new)


FUZZ = settings(
    max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "15")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A directory with the checkpoints 7 and 9, and their states. Do not modify it.

    Some arrays have 4 KB, which are stored elsewhere than those of up to 1 KB.
    """
    folder = tmp_path_factory.mktemp("two") / "c"
    old, new = (make_state(np.random.default_rng(seed), width=1000) for seed in (1, 2))
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(7, old)
        checkpoints.save(9, new, 0.3)
    return folder, old, new


@pytest.fixture(scope="module")
def saved_tree(tmp_path_factory):
    """What `save_tree` has saved, and the tree. Do not modify it."""
    folder = tmp_path_factory.mktemp("tree") / "t"
    tree = {"a": {"kernel": np.random.default_rng(0).normal(size=1000)}, "b": np.arange(3)}
    save_tree(folder, tree)
    assert equal(restore_tree(folder, tree), tree)
    return folder, tree


def damage_anyhow(draw, folder):
    """Changes one file in a folder, chosen by `draw`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Names of data files are random: their sizes name them.
    files.sort(key=lambda path: (path.relative_to(folder).parts[:-1], path.stat().st_size))
    file = draw(st.sampled_from(files))
    whole = file.read_bytes()
    kinds = ["gone", "empty", "cut", "flip", "zero", "folder", "no_folder", "text", "json"]
    how = draw(st.sampled_from(kinds))
    match how:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(whole[: draw(st.integers(0, len(whole) - 1))])
        case "flip":
            place, bit = draw(st.integers(0, len(whole) - 1)), draw(st.integers(0, 7))
            flipped = bytes([whole[place] ^ (1 << bit)])
            file.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        case "zero":
            file.write_bytes(bytes(len(whole)))
        case "folder":
            file.unlink()
            file.mkdir()
        case "no_folder":
            shutil.rmtree(file.parent)
            file.parent.write_bytes(b"")
        case "text":
            file.write_bytes(draw(st.sampled_from([b"null", b"[]", b"{}", b"3", b"[" * 9999])))
        case "json":
            with contextlib.suppress(ValueError):
                file.write_text(json.dumps(changed_json(draw, json.loads(whole))))


def changed_json(draw, value):
    """A JSON value with a change somewhere."""
    if not isinstance(value, dict | list) or not value or not draw(st.integers(0, 5)):
        return draw(st.sampled_from([None, True, -1, 2**70, float("nan"), "x", [], {}, [[]]]))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 3)):
        value[key] = changed_json(draw, value[key])
    else:
        del value[key]
    return value


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@FUZZ
@given(data=st.data())
def test_whatever_is_damaged_a_saved_state_is_restored_or_it_is_one_line(
    tmp_path_factory, two_checkpoints, data
):
    folder, (good, old, new) = tmp_path_factory.mktemp("any") / "c", two_checkpoints
    shutil.copytree(good, folder)
    damage_anyhow(data.draw, folder / "9")
    skipped = []
    try:
        with Checkpoints(folder, keep=2) as checkpoints:
            restored = checkpoints.restore(blank(new), skipped=lambda *what: skipped.append(what))
            for step, why in skipped:
                assert step == 9
                assert "\n" not in why
                checkpoints.set_aside(step)
            has_newest = checkpoints.latest == 9
            assert_same(restored, new if has_newest else old)
            checkpoints.save(11, new, 0.2)
            checkpoints.wait()
            assert checkpoints.latest == 11
    except ConfigError as error:
        line = str(error)
        assert str(folder) in line
        assert "\n" not in line
        assert "; delete" in line
        named = [Path(line.partition(": damaged; ")[0])]
        if "delete the files _CHECKPOINT_METADATA" in line:
            named = list(folder.glob("*/_CHECKPOINT_METADATA"))
        for path in named:  # as the line says
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with Checkpoints(folder, keep=2) as checkpoints:
            assert_same(checkpoints.restore(blank(new)), new)


@pytest.mark.parametrize("content", [None, b"", bytes(50_000), b"null"])
@pytest.mark.parametrize("part", ["ocdbt.process_0/d/*", "array_metadatas/*"])
def test_damage_is_found_before_orbax_prints_pages(tmp_path, two_checkpoints, capfd, part, content):
    shutil.copytree(two_checkpoints[0], tmp_path / "c")
    files = (tmp_path / "c/9/default").glob(part)
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(content) if content is not None else largest.unlink()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.restore(blank(two_checkpoints[1]))
    gc.collect()  # tasks of Orbax that nobody waits for complain at their end
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("byte", [0.1, 0.5, 0.9])
def test_a_changed_value_of_a_large_array_is_noticed(tmp_path, two_checkpoints, byte):
    """A bit that flips on the disk: neither zstd nor OCDBT has a checksum of such an array."""
    shutil.copytree(two_checkpoints[0], tmp_path / "c")
    files = (tmp_path / "c/9/default").rglob("*")
    largest = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    whole = bytearray(largest.read_bytes())
    whole[int(byte * len(whole))] ^= 1
    largest.write_bytes(whole)
    skipped = []
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        like = blank(two_checkpoints[1])
        restored = checkpoints.restore(like, skipped=lambda *what: skipped.append(what))
    assert_same(restored, two_checkpoints[1])
    assert [step for step, _ in skipped] == [9]


def test_a_checkpoint_of_an_older_version_has_no_checksum(tmp_path, two_checkpoints):
    shutil.copytree(two_checkpoints[0], tmp_path / "c")
    (tmp_path / "c/9/metrics/metrics").write_text('{"AP": 0.3}')
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert_same(checkpoints.restore(blank(two_checkpoints[2])), two_checkpoints[2])


@FUZZ
@given(data=st.data())
def test_a_damaged_tree_is_what_was_saved_or_an_exception(tmp_path_factory, saved_tree, data):
    folder, (good, tree) = tmp_path_factory.mktemp("any") / "tree", saved_tree
    shutil.copytree(good, folder)
    damage_anyhow(data.draw, folder)
    restored = tree
    with contextlib.suppress(Exception):  # of which its caller makes one line
        restored = restore_tree(folder, tree)
    assert equal(restored, tree)


def test_only_damaged_checkpoints_are_one_line(rng, tmp_path):
    state = make_state(rng)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state)
    damage(tmp_path / "7" / "default" / "manifest.ocdbt", "truncated")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ConfigError, match=r"7: cannot be read .*from scratch") as refused,
    ):
        checkpoints.restore(blank(state))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ask", ["check", "wait", "save"])
def test_the_first_checkpoint_that_cannot_be_read_back_is_said_at_once(rng, tmp_path, ask):
    state = make_state(rng)

    def ask_until_it_is_said(checkpoints):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            match ask:
                case "check":
                    checkpoints.check()
                case "wait":
                    checkpoints.wait()
                case "save":
                    checkpoints.save(9, state)

    with Checkpoints(tmp_path / "lr[0.1]") as checkpoints:  # Orbax's own glob finds nothing there
        checkpoints.save(7, state)
        with pytest.raises(ConfigError, match=r"7: the first .* cannot be read back") as said:
            ask_until_it_is_said(checkpoints)
    assert "\n" not in str(said.value)
    assert "`run_dir`" in str(said.value)


ODD = [chr(code) for code in range(1, 0x250) if chr(code) != "/"] + list("猫\u2028\U0001f600\udc80")


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "12")), deadline=None)
@given(name=st.text(st.sampled_from(ODD), min_size=1, max_size=6))
@example(name="**")
@example(name="[a]")
@example(name="gs:")
def test_a_path_is_refused_or_its_checkpoints_can_be_read(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("any") / name
    try:
        check_location(folder)
    except ConfigError:
        assert set(name) & set("*?[\\:\0\udc80")
        return
    state = make_state(np.random.default_rng(0))
    with Checkpoints(folder / "c") as checkpoints:
        checkpoints.save(7, state)
        checkpoints.wait()
        assert_same(checkpoints.restore(blank(state)), state)


@contextlib.contextmanager
def full_disk(size=2000):
    """No file of this process can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax's threads end with the error as well, which pytest would report.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_costs_one_save_and_no_older_checkpoint(rng, tmp_path):
    first, second = make_state(rng, width=2000), make_state(rng, width=2000)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, first)
        checkpoints.wait()
        with full_disk(), pytest.raises(CheckpointFailed) as failed:  # noqa: PT012
            checkpoints.save(9, second)
            checkpoints.wait()  # whichever of the two notices
        assert "\n" not in str(failed.value)
        assert checkpoints.steps == [7]
        assert_same(checkpoints.restore(blank(first)), first)
        checkpoints.check()
        checkpoints.save(9, second)  # there is room again
        checkpoints.wait()
        checkpoints.remove_fragments()  # a thread of the save that failed may have left one
        assert {path.name for path in tmp_path.iterdir()} == {"9"}
        assert_same(checkpoints.restore(blank(second)), second)


def test_fragments_are_removed(rng, tmp_path):
    (tmp_path / "9.orbax-checkpoint-tmp-1" / "default").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, make_state(rng))
        checkpoints.wait()
        checkpoints.remove_fragments()
    assert {path.name for path in tmp_path.iterdir()} == {"7"}

"""`ghm-jax train --profile N:M`: which steps a profile holds, and that it is written."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest
from tiny import Listener, tiny_config

from ghm_jax.cli.train import steps_to_profile
from ghm_jax.exceptions import ArgumentError, UserError
from ghm_jax.train import train
from ghm_jax.training.profiling import Profiler


def profiled_steps(directory):
    """The steps in the profiles of a TensorBoard directory; empty without a profile."""
    steps = set()
    for path in directory.glob("plugins/profile/*/*.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        numbers = [event.get("args", {}).get("step_num") for event in events]
        steps |= {int(number) for number in numbers if number is not None}
    return steps


def run(profiler, steps):
    """Steps of a program that does little."""
    work, x = jax.jit(lambda x: x @ x / 100), jnp.ones((100, 100))
    for step in steps:
        profiler.before(step)
        x = work(x)
        profiler.after(step, x)


@pytest.mark.parametrize(
    ("requested", "taken", "found"),
    [
        ((2, 3), range(1, 6), {2, 3}),
        ((4, 9), range(1, 6), {4, 5}),  # the run ends before
        ((2, 3), range(3, 6), {3}),  # it resumes in between
        ((2, 3), range(4, 6), set()),  # or after
        (None, range(1, 4), set()),
    ],
)
def test_a_profile_holds_the_requested_steps(tmp_path, requested, taken, found):
    lines = []
    profiler = Profiler(tmp_path, requested, lines.append)
    run(profiler, taken)
    profiler.close()
    assert profiled_steps(tmp_path) == found
    assert len(lines) == bool(found)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb")) or not found


def test_a_profile_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    def full():
        stop()
        raise OSError("No space left on device")

    stop, lines = jax.profiler.stop_trace, []
    monkeypatch.setattr("ghm_jax.training.profiling.jax.profiler.stop_trace", full)
    run(Profiler(tmp_path, (1, 2), lines.append), range(1, 4))
    assert lines == [
        "the profile could not be written (No space left on device); training continues"
    ]


@pytest.mark.usefixtures("quick_compilation")
def test_training_writes_its_profile_where_tensorboard_looks_for_it(dataset_dir, tmp_path):
    listener = Listener()
    train(tiny_config(dataset_dir), tmp_path / "run", profile=(3, 4), progress=listener)
    assert profiled_steps(tmp_path / "run" / "tensorboard") == {3, 4}
    assert any(re.search("profile written to .*run/tensorboard", line) for line in listener.lines)


@pytest.mark.parametrize("text", ["5", "5-7", "5:", ":7", "a:b", "-1:3", "1:2:3"])
def test_text_that_is_not_a_pair_of_steps_is_refused(text):
    with pytest.raises(ArgumentError, match=r"^profile: .* is not N:M; .*10:12$"):
        steps_to_profile(text)


def test_steps_are_read_from_the_command_line():
    assert steps_to_profile("10:12") == (10, 12)
    assert steps_to_profile("") is None


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (6, 7)])
def test_steps_that_a_run_does_not_have_are_refused_before_it_begins(dataset_dir, tmp_path, steps):
    with pytest.raises(UserError, match=r"^profile: .*which has 6;"):
        train(tiny_config(dataset_dir), tmp_path / "run", profile=steps)
    assert not list(tmp_path.iterdir())

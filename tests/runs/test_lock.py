"""One job at a time trains in a run's directory; what a killed one left is taken over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_jax.config import Config
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs import lock
from ghm_jax.runs.directory import claim_run
from ghm_jax.runs.lock import LOCK, SILENCE, lock_directory

HOLD = """
import sys, time
from pathlib import Path
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.lock import lock_directory

folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock_directory(folder, lambda line: None):
        print("held", flush=True)
        sys.stdin.readline()
except ConfigError as error:
    print("refused", flush=True)
"""


def silent(line):
    pytest.fail(line)


def start(folder):
    """A process that tries to lock the folder when it gets a line, and ends at the next one."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go_on(process):
    process.stdin.write("\n")
    process.stdin.flush()


def refusal(folder):
    with pytest.raises(ConfigError) as refused, lock_directory(folder, silent):
        pytest.fail("locked twice")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def taken_over(folder):
    """Locks the folder, and gives back what was said about it."""
    said = []
    with lock_directory(folder, said.append):
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert not list(folder.iterdir())
    (line,) = said
    return line


@pytest.fixture
def mine(tmp_path):
    """The content of a lock of this process."""
    with lock_directory(tmp_path, silent):
        text = (tmp_path / LOCK).read_text()
    assert not list(tmp_path.iterdir())
    return json.loads(text)


def leave(folder, content, *, age=0.0):
    """A lock with this content, renewed `age` seconds ago."""
    file = folder / LOCK
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(file, times=(time.time() - age,) * 2)


@pytest.mark.parametrize("waited_for", [True, False], ids=["gone", "zombie"])
def test_a_process_that_lives_keeps_others_out_and_one_that_was_killed_does_not(
    tmp_path, waited_for
):
    process = start(tmp_path)
    try:
        go_on(process)
        assert process.stdout.readline() == "held\n"
        line = refusal(tmp_path)
        assert f"is being trained by process {process.pid} on" in line
        assert "`run_dir`" in line
        process.send_signal(signal.SIGKILL)
        if waited_for:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert f"process {process.pid} on" in taken_over(tmp_path)
    finally:
        process.kill()
        process.communicate()


def test_of_many_that_find_a_left_lock_one_gets_it(tmp_path, mine):
    leave(tmp_path, mine | {"started": "long ago"})
    processes = [start(tmp_path) for _ in range(6)]
    for process in processes:
        go_on(process)
    said = [process.stdout.readline() for process in processes]
    assert sorted(said) == ["held\n", *["refused\n"] * 5]
    for process in processes:
        process.communicate("\n")
    assert not list(tmp_path.iterdir())


def test_the_same_process_cannot_claim_a_run_twice(tmp_path):
    with claim_run(tmp_path / "run", Config()):
        for restart in (False, True):
            with (
                pytest.raises(ConfigError, match=r"process \d+ \(this one\)"),
                claim_run(tmp_path / "run", Config(), restart=restart),
            ):
                pytest.fail("claimed twice")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "run"]


def test_a_process_id_that_is_used_again_is_another_process(tmp_path, mine):
    if not mine["started"]:
        pytest.skip("only Linux tells when a process started")
    leave(tmp_path, mine | {"started": "1" + mine["started"]})
    assert f"process {os.getpid()} on" in taken_over(tmp_path)


def test_another_machine_is_believed_while_it_gives_signs_of_life(tmp_path, mine):
    other = mine | {"host": "far", "place": "far away"}
    leave(tmp_path, other, age=5)
    line = refusal(tmp_path)
    for words in (f"process {os.getpid()} on far", "sign of life", f"delete {tmp_path / LOCK}"):
        assert words in line
    leave(tmp_path, other, age=SILENCE + 5)
    assert "took over the stale lock of process" in taken_over(tmp_path)


def test_a_lock_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.01)
    with lock_directory(tmp_path, silent):
        file = tmp_path / LOCK
        os.utime(file, times=(0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_that_a_person_deleted_is_not_missed(tmp_path, mine):
    other = mine | {"host": "far", "place": "far away"}
    with lock_directory(tmp_path, silent):
        (tmp_path / LOCK).unlink()
        leave(tmp_path, other)
    assert json.loads((tmp_path / LOCK).read_text()) == other  # it is not ours to remove


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "100")), deadline=None)
@given(
    st.one_of(
        st.text(max_size=30),
        st.dictionaries(
            st.sampled_from(["host", "pid", "started", "place", "else"]),
            st.one_of(st.none(), st.text(max_size=3), st.integers(), st.floats(), st.booleans()),
        ).map(json.dumps),
    )
)
def test_a_lock_of_any_content_is_in_use_until_it_is_old(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any_lock"
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "is being trained by" in refusal(folder)
    os.utime(folder / LOCK, times=(0, 0))
    assert "took over" in taken_over(folder)

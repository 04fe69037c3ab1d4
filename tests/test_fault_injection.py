"""A short version of the fault tests; `python -m experiments.fault_injection` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("store", ["disk", "gs"])
def test_a_run_survives_kills_damage_a_full_disk_and_bad_input(tmp_path, store):
    if store == "gs":
        pytest.importorskip("bucket_emulator")
    command = [
        sys.executable,
        "-m",
        "experiments.fault_injection",
        "--kills",
        "3",
        "--repeats",
        "1",
        "--steps",
        "30",
        "--store",
        store,
    ]
    out = tmp_path / "fault_injection.json"
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert sum(row["tried"] for row in rows if "SIGKILL" in row["fault"]) == 3
    assert all(row["tried"] == row["survived"] for row in rows)
    assert not any(row["data_lost"] for row in rows)

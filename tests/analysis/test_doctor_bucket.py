"""`ghm-jax doctor gs://...` tries the bucket, and leaves nothing there."""

import pytest
from bucket_emulator import URL

from ghm_jax import cli
from ghm_jax.analysis.doctor.store import examine_bucket
from ghm_jax.storage import as_path


def lines(capsys, *words):
    """What `ghm-jax doctor` prints about a bucket, and whether it finds a fault."""
    try:
        cli.main(["doctor", *words])
        faults = False
    except SystemExit as exit_:
        faults = bool(exit_.code)
    out = capsys.readouterr().out
    return [line for line in out.splitlines() if "gs://" in line], faults


def test_a_bucket_that_works_is_timed(store, capsys):
    (line,), faults = lines(capsys, f"{URL}/runs/new")
    assert not faults
    assert line.startswith("ok    bucket")
    for word in ("1 MB", "written in", "read in", "deleted in"):
        assert word in line
    assert not store.objects


def test_a_bucket_that_is_not_there_is_a_fault(store, capsys):
    del store
    (line,), faults = lines(capsys, "gs://nobody-has-this/runs")
    assert faults
    assert line.startswith("BAD")
    assert "no such bucket; create it" in line


@pytest.mark.parametrize(("status", "remedy"), [(403, "grant the account"), (404, "network")])
def test_a_bucket_that_cannot_be_written_is_a_fault(store, status, remedy):
    place = as_path(f"{URL}/runs/new")
    store.faults.every, store.faults.status = 1, status
    (finding,) = examine_bucket(place)
    assert not finding.good
    assert "cannot be written" in finding.says
    assert remedy in finding.remedy

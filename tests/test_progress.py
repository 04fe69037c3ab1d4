"""The status of a running job: one line that fits."""

import gc
import re
import sys

import pytest

from ghm_jax.progress import Bar, status

FIELDS = {"class": "0.951", "box": "0.0123", "lr": "0.01", "img/s": "41.2", "data": "3%"}
LONG = FIELDS | {"MFU": "43%", "CE": "0.0123"}


@pytest.mark.parametrize("columns", range(40, 130, 7))
def test_a_line_holds_the_fields_that_fit_completely(columns):
    line = status("train", 10_560, 87_960, 33_182.0, LONG, columns)
    assert len(line) <= columns
    assert line.startswith("train 10560/87960, 9:13:02 left")
    words = line.partition("left: ")[2].split()
    shown = list(zip(words[::2], words[1::2], strict=True))
    assert shown == list(LONG.items())[: len(shown)]


def test_a_hundred_columns_hold_the_main_fields_and_eighty_those_of_a_small_run():
    assert status("train", 10_560, 87_960, 33_182.0, LONG, 99).endswith("data 3% MFU 43%")
    assert status("train", 120, 1000, 80.0, FIELDS, 79).endswith("img/s 41.2 data 3%")


def test_the_time_left_is_from_the_average_pace_and_survives_another_job(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("ghm_jax.progress.time.perf_counter", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "100")
    bar = Bar()

    def shown(name: str, done: int, total: int) -> str:
        bar.close()  # so that the next line is certainly written
        bar.update(name, done, total, {"loss": "{braces}"})
        return capsys.readouterr().err.split("\r")[-1]

    assert "train 10/50, ? left: loss {braces}" in shown("train", 10, 50)
    now[0] += 20.0
    assert "train 20/50, 01:00 left" in shown("train", 20, 50)
    assert "evaluate 1/9, ? left" in shown("evaluate", 1, 9)
    now[0] += 40.0  # the evaluation: 60 seconds for 20 steps with it
    assert "train 30/50, 01:00 left" in shown("train", 30, 50)
    assert "evaluate 1/9, ? left" in shown("evaluate", 1, 9)  # the second one starts from scratch
    assert all(len(line) < 100 for line in re.split(r"[\r\n]", capsys.readouterr().err))
    bar.close()


def test_a_bar_ends_before_an_error_is_shown(capsys):
    with pytest.raises(ValueError, match="broken"), Bar() as bar:  # noqa: PT012 (both belong to it)
        bar.update("check", 1, 3, {})
        raise ValueError("broken")
    assert capsys.readouterr().err.endswith("\n")
    print("ghm-jax: broken", file=sys.stderr)
    del bar
    gc.collect()
    assert capsys.readouterr().err == "ghm-jax: broken\n"  # alone, and nothing comes after it

"""The benchmarks measure what they claim to; their speed is not tested."""

import json

import cv2
import numpy as np
import pytest

from ghm_jax.bench.data import DECODE, LIMIT, PIPELINE, make_records, measure_data, measure_loader
from ghm_jax.bench.losses import make_inputs, measure_losses
from ghm_jax.cli import main
from ghm_jax.config import Data
from ghm_jax.data.transforms import decode_image


def test_every_loss_is_measured_at_every_size():
    rows = measure_losses(((64, 64), (64, 96)), repeats=2)
    for size in ((64, 64), (64, 96)):
        of_size = {row.loss: row for row in rows if row.padded_size == size}
        names = {"cross-entropy", "focal loss", "focal loss (optax)", "GHM-C", "GHM-C exact"}
        assert names | {"GHM-R"} <= set(of_size)
        assert of_size["focal loss"].to_focal == 1
        assert all(0 < row.fastest <= row.milliseconds for row in of_size.values())


def test_inputs_have_all_kinds_of_anchors():
    inputs = make_inputs(20_000)
    assert inputs.logits.shape == (20_000, 80)
    assert {-2, -1} < set(inputs.classes.tolist())


def test_the_command_prints_a_table_and_writes_it(tmp_path, capsys):
    out = tmp_path / "bench.json"
    main(["bench", "losses", "--sizes", "64", "64", "--repeats", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [row["loss"] in printed for row in record["rows"]] == [True] * len(record["rows"])
    assert {tuple(row["image_size"]) for row in record["rows"]} == {(64, 64)}
    assert record["versions"]["jax"]


SMALL = Data(short_side=64, long_side=96, buckets=((64, 96), (96, 64)))


def test_every_stage_of_the_pipeline_is_measured_against_the_limit():
    threads = cv2.getNumThreads()
    rows = {row.stage: row for row in measure_data((48, 64), repeats=3, data=SMALL)}
    assert cv2.getNumThreads() == threads
    assert {DECODE, LIMIT, "decode", "resize", "flip", "batch", PIPELINE} <= set(rows)
    for row in rows.values():
        assert 0 < row.fastest <= row.milliseconds
        assert row.images_per_second == pytest.approx(1000 / row.milliseconds)
        assert row.of_limit == pytest.approx(rows[LIMIT].milliseconds / row.milliseconds)


def test_records_are_pictures_of_the_size_and_weight_of_coco():
    (record,) = make_records(1, (480, 640))
    assert decode_image(record["image"]).shape == (480, 640, 3)
    assert 100_000 < len(record["image"]) < 200_000
    y0, x0, y1, x1 = np.array(record["objects"]["bbox"]).T
    assert (y0 < y1).all()
    assert (x0 < x1).all()


def test_the_loader_is_timed_for_every_number_of_workers():
    (row,) = measure_loader((0,), (48, 64), num_batches=2, data=SMALL)
    assert row.workers == 0
    assert row.images_per_second > 0


def test_the_data_command_prints_a_table_and_writes_it(tmp_path, capsys):
    out = tmp_path / "bench.json"
    sizes = ["--source", "48", "64", "--repeats", "1", "--batches", "1", "--workers", "0"]
    main(["bench", "data", *sizes, "--out", str(out)])
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert all(row["stage"] in printed for row in record["rows"])
    assert [row["workers"] for row in record["loader"]] == [0]
    assert record["command"].startswith("ghm-jax bench data --source 48 64")

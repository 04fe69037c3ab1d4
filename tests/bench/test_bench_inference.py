"""The inference benchmark measures what it claims to; its speed is not tested."""

import json

import jax
import numpy as np
import pytest

from ghm_jax.bench.inference import (
    InferenceCase,
    InferenceTime,
    last_layer,
    measure_inference,
)
from ghm_jax.cli import main

TINY = InferenceCase(
    backbone="resnet10", padded_size=(64, 96), batch_size=2, dtype="float32", channels=8
)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_peaked_scores_give_few_candidates_and_flat_ones_all():
    peaked, flat = measure_inference(TINY, jax.devices()[:2], repeats=2)
    assert (peaked.scores, flat.scores) == ("peaked", "flat")
    pairs = 9 * 80 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1)
    assert flat.candidates == pairs
    assert peaked.candidates == 300
    assert flat.detections == 100  # as many as there may be
    for row in (peaked, flat):
        assert 0 < row.fastest <= row.milliseconds
        assert row.images_per_second * row.milliseconds == pytest.approx(2000)
        assert row.share == pytest.approx(row.selection / (row.network + row.selection))


def test_the_last_layer_gives_the_chosen_number_of_scores_above_the_threshold(rng):
    fresh = rng.normal(0, 1e-4, (2, 5000))
    factor, biases = last_layer(fresh, 0.05)
    for kind, count in (("peaked", 600), ("flat", 10_000)):
        scores = 1 / (1 + np.exp(-(fresh * factor + biases[kind])))
        assert np.sum(scores > 0.05) == pytest.approx(count, abs=15)
    assert np.std(fresh * factor) == pytest.approx(1)


def test_a_detector_timed_without_stages_has_no_share():
    measured = InferenceTime("torchvision", "flat", 1, 1.0, 1.0, 1.0, 1.0, None, None)
    assert measured.share is None


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_inference_bench_prints_its_table_and_writes_it(tmp_path, capsys):
    out = tmp_path / "bench.json"
    settings = "--backbone resnet10 --size 64 96 --batch-size 8 --channels 8 --repeats 1"
    main(["bench", "inference", *settings.split(), "--out", str(out)])
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["command"].startswith(f"ghm-jax bench inference {settings}")
    assert record["case"]["devices"] == 8
    assert record["case"]["image_size"] == [64, 96]
    assert [row["scores"] for row in record["rows"]] == ["peaked", "flat"]
    assert "8 images of 64 x 96 per call, float32, on 8 x cpu" in printed
    assert f"{record['rows'][1]['share']:.1%}" in printed

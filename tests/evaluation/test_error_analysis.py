"""Errors that are injected one kind at a time are classified as that kind."""

import json

import numpy as np
import pytest
from coco_scene import NAMES, detections_of, moved, other_class, scene

from ghm_jax.evaluation.error_analysis import CONFUSION_MIN_SCORE, error_analysis
from ghm_jax.plots.error_cards import error_cards

KINDS = {
    "Cls": lambda row: [other_class(row)],
    "Loc": lambda row: [moved(row, 0.6)],  # IoU 0.25
    "Both": lambda row: [other_class(moved(row, 0.6))],
    "Dupe": lambda row: [row, {**moved(row, 0.1), "score": 0.5}],
    "Bkg": lambda row: [row, {**row, "bbox": [400.0, 400.0, 50.0, 50.0]}],
    "Miss": lambda row: [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_is_counted_as_that_kind(rng, kind):
    truth = scene(rng)
    found = detections_of(truth)
    broken = rng.choice(len(found), 5, replace=False)
    rows = [r for i, row in enumerate(found) for r in (KINDS[kind](row) if i in broken else [row])]
    errors = error_analysis(truth, rows)
    tide = errors["tide"]
    # TIDE also counts an object as missed if its only box is wrong in both ways.
    expected = {kind: 5} | ({"Miss": 5} if kind == "Both" else {})
    assert {k: n for k, n in tide["counts"].items() if n} == expected
    assert all(tide["delta_ap"][k] < 1e-9 for k in KINDS.keys() - expected.keys())
    if kind in ("Cls", "Loc", "Both", "Miss"):
        assert tide["ap"] < 1
        assert max(tide["delta_ap"][k] for k in expected) > 0.01

    matrix = np.array(errors["confusion"]["matrix"])
    assert matrix[:-1].sum() == len(truth["annotations"])  # each object once
    missed = {"Loc": 5, "Both": 5, "Miss": 5}.get(kind, 0)
    assert matrix[:-1, -1].sum() == missed
    assert np.trace(matrix) == len(truth["annotations"]) - missed - 5 * (kind == "Cls")
    assert errors["confusion"]["names"] == list(NAMES)


def test_scores_and_calibration_are_those_of_numpy(rng):
    truth = scene(rng, images=40)
    found = detections_of(truth)
    right = rng.random(len(found)) < 0.6
    rows = [row if ok else moved(row, 2.5) for row, ok in zip(found, right, strict=True)]
    scores = rng.uniform(0.05, 0.999, len(rows))
    rows = [{**row, "score": float(s)} for row, s in zip(rows, scores, strict=True)]
    errors = error_analysis(truth, rows)
    # A box that was moved may overlap a neighbour, but that has another class.
    for key, mask in (("correct", right), ("wrong", ~right)):
        expected = np.histogram(scores[mask], 20, (0, 1))[0]
        np.testing.assert_array_equal(errors["scores"][key], expected)
    expected = 0.0
    for found in errors["calibration"]["bins"]:
        inside = (scores >= found["score_from"]) & (scores < found["score_to"])
        assert found["count"] == inside.sum()
        if found["count"]:
            assert found["score"] == pytest.approx(scores[inside].mean())
            assert found["precision"] == pytest.approx(right[inside].mean())
            expected += inside.mean() * abs(scores[inside].mean() - right[inside].mean())
    assert errors["calibration"]["ece"] == pytest.approx(expected)
    weak = scores < CONFUSION_MIN_SCORE
    assert np.array(errors["confusion"]["matrix"])[:, :-1].sum() == (~weak).sum()


def test_precision_of_a_perfect_detector_is_one_at_every_recall(rng):
    truth = scene(rng)
    curves = error_analysis(truth, detections_of(truth))["precision_recall"]
    assert len(curves["recall"]) == 101
    for precision in curves["precision"].values():
        assert precision == pytest.approx([1.0] * 101)


def test_without_detections_or_objects_there_is_no_analysis(rng):
    truth = scene(rng)
    crowds = [{**a, "iscrowd": 1} for a in truth["annotations"]]
    for errors in (
        error_analysis(truth, []),
        error_analysis({**truth, "annotations": []}, detections_of(truth)),
        error_analysis({**truth, "annotations": crowds}, detections_of(truth)),
    ):
        assert set(errors.values()) == {None}
        assert error_cards(errors) == []
    assert error_cards(None) == []


@pytest.mark.parametrize("classes", [3, 30])
def test_cards_name_the_classes_and_the_confusions(rng, classes):
    truth = scene(rng)
    extra = [{"id": 100 + i, "name": f"c{i}"} for i in range(classes - 3)]
    truth["categories"] = truth["categories"] + extra
    found = detections_of(truth)
    errors = error_analysis(truth, [*found[:2], other_class(found[2]), *found[3:]])
    json.dumps(errors)
    html = "".join(error_cards(errors))
    assert "&lt;tag&gt; &amp; co" in html
    assert "<tag>" not in html
    for word in ("What is wrong", "Precision and recall", "Scores", "Calibration", "Confusion"):
        assert f"<h2>{word}</h2>" in html
    assert ("co detected as cat" in html) == (classes > 12)

"""Scores are those of pycocotools; what a run's evaluation writes can be read by it as well."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coco_oracle import pycocotools_figures
from tiny import Listener, tiny_config

from ghm_jax.config import Run
from ghm_jax.data import coco_ground_truth, open_dataset, validation_batches
from ghm_jax.detection.anchors import level_sizes
from ghm_jax.detection.levels import split_levels
from ghm_jax.detection.outputs import make_targets
from ghm_jax.distributed.devices import choose_devices
from ghm_jax.evaluate import evaluate, evaluate_file
from ghm_jax.evaluation.coco import METRICS, load_results, score
from ghm_jax.evaluation.detector import Detector, detect
from ghm_jax.exceptions import ArgumentError, ConfigError
from ghm_jax.progress import Silent
from ghm_jax.runs.directory import RunDirectory, load_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def evaluated_run(finished_run, tmp_path_factory):
    """A copy of the finished run, evaluated: its directory, what came back, its listener."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(finished_run[0].path, path)
    listener = Listener()
    with pytest.MonkeyPatch.context() as patch:
        # After so few steps every score is low: without a threshold there are detections.
        patch.setattr("ghm_jax.evaluate.load_run", lambda p, **_: with_threshold(p, 0.0))
        result = evaluate(path, progress=listener)
    return RunDirectory(path), result, listener


def with_threshold(path, threshold):
    run, config = load_run(path)
    predict = dataclasses.replace(config.predict, score_threshold=threshold)
    return run, dataclasses.replace(config, predict=predict)


@pytest.fixture(scope="module")
def validation(dataset_dir):
    return open_dataset(tiny_config(dataset_dir).data, "validation")


def test_metrics_json_holds_fractions_and_what_was_scored(evaluated_run):
    run, result, listener = evaluated_run
    assert json.loads(run.metrics.read_text()) == result.summary()
    assert result.metrics.keys() == METRICS.keys()
    assert 0 <= result.metrics["AP"] <= result.metrics["AP50"] <= 1
    assert result.per_class.keys() == {"dark", "light", "absent"}
    assert result.per_class["absent"] == -1.0
    assert (result.step, result.split, result.images) == (6, "validation", 6)
    assert (result.evaluator, result.ground_truth) == ("hotcoco", "tfds:squares")
    assert listener.steps[:2] == [4, 6]  # of the last batch two count
    assert "evaluating step 6 on 6 images" in listener.lines[0]


def test_detections_json_is_read_by_pycocotools_and_gives_the_same_figures(
    evaluated_run, validation
):
    run, result, _ = evaluated_run
    found = json.loads(run.detections.read_text())
    assert found
    assert {row["image_id"] for row in found} <= {101 + 7 * i for i in range(6)}
    assert {row["category_id"] for row in found} <= {2, 5, 9}
    figures = pycocotools_figures(coco_ground_truth(validation), str(run.detections))
    np.testing.assert_allclose([result.metrics[key] for key in METRICS], figures, atol=1e-6)


def test_the_report_is_written(evaluated_run):
    html = evaluated_run[0].report.read_text()
    assert html.lstrip().lower().startswith("<!doctype html>")
    assert "squares" in html
    assert json.loads(evaluated_run[0].errors.read_text())["tide"]["ap"] >= 0
    for heading in ("What is wrong", "Calibration", "Class scores now", "Boxes now"):
        assert f"<h2>{heading}</h2>" in html


def test_figures_do_not_depend_on_the_number_of_shards(finished_run, dataset_dir, validation):
    state = jax.tree.map(np.asarray, finished_run[1])
    output = state.params["class_head"]["output"]
    output = {**output, "kernel": 100 * output["kernel"]}  # scores that clearly differ
    params = {**state.params, "class_head": {"output": output}}
    variables = {"params": params, "batch_stats": state.batch_stats}
    truth, found = coco_ground_truth(validation), []
    # Six images: two batches of 3; one of 7 and one of 8 with one and two fillers.
    for count, wrapper in ((1, "pmap"), (3, "pmap"), (7, "shard_map"), (8, "pmap")):
        config = tiny_config(dataset_dir, run=Run(wrapper=wrapper, workers=0))
        predict = dataclasses.replace(config.predict, batch_size=count)
        config = dataclasses.replace(config, predict=predict)
        detector = Detector(config, len(validation.class_names), choose_devices(count))
        found.append(detect(detector, config, validation, variables, Silent()))
    assert len(found[0]) > 20
    for other in found[1:]:
        assert len(other) == len(found[0])
        for a, b in zip(found[0], other, strict=True):
            assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
            np.testing.assert_allclose(a["score"], b["score"], atol=5e-5)
            np.testing.assert_allclose(a["bbox"], b["bbox"], atol=5e-3)
        assert score(truth, other) == score(truth, found[0])


def test_a_results_file_is_scored_like_the_run_that_wrote_it(evaluated_run, tmp_path):
    run, result, _ = evaluated_run
    again = evaluate_file(run.path, run.detections)
    assert again.file == str(run.detections)
    assert dataclasses.replace(again, step=6, file=None) == result
    experiment = tmp_path / "tiny.py"
    config = load_run(run.path)[1]
    experiment.write_text(f"from ghm_jax.config import *\nconfigs = {{'row': {config!r}}}")
    row = f"{experiment}:row"
    assert evaluate_file(row, run.detections, evaluator="pycocotools").metrics["AP"] == (
        pytest.approx(result.metrics["AP"], abs=1e-6)
    )


def test_the_errors_of_a_results_file_are_those_of_the_run_that_wrote_it(evaluated_run, tmp_path):
    run, _, _ = evaluated_run
    before = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    out = RunDirectory(tmp_path / "new" / "found")
    result = evaluate_file(run.path, run.detections, out.path)
    assert sorted(path.name for path in out.path.iterdir()) == [
        *("errors.json", "metrics.json", "report.html"),
    ]
    assert json.loads(out.errors.read_text()) == json.loads(run.errors.read_text())
    assert json.loads(out.metrics.read_text()) == result.summary()
    page = out.report.read_text()
    assert "<title>detections.json</title>" in page
    assert "data.short_side" in page
    assert "loss.ghm_c.bins" not in page  # the losses behind the file are unknown
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(ArgumentError, match=r"^out: .*found is not empty"):
        evaluate_file(run.path, run.detections, out.path)


def test_a_test_set_gives_the_file_that_the_server_requires(
    finished_run, validation, tmp_path, monkeypatch
):
    run = tmp_path / "squares_ghm"
    shutil.copytree(finished_run[0].path, run)
    monkeypatch.setattr("ghm_jax.evaluate.load_run", lambda p, **_: with_threshold(p, 0.0))
    truth = coco_ground_truth(validation)
    del truth["annotations"]
    dropped = truth["images"].pop(0)["id"]  # test-dev is a subset of the test images
    listing = tmp_path / "image_info_test-dev2017.json"
    listing.write_text(json.dumps(truth))
    before = sorted(run.iterdir())

    result = evaluate(run, annotations=str(listing))
    path = run / "detections_test-dev2017_squares_ghm_results.json"
    assert (result.path, result.images) == (path, 5)
    assert sorted(run.iterdir()) == sorted([*before, path])  # no figures, no report
    rows = load_results(path, truth)
    images = {row["image_id"] for row in rows}
    assert images
    assert dropped not in images
    full = coco_ground_truth(validation)
    assert pycocotools_figures(full, str(path)).shape == (12,)


def test_annotations_of_other_images_are_refused_and_subsets_are_scored_alone(
    finished_run, validation, tmp_path
):
    path, found = tmp_path / "instances.json", tmp_path / "found.json"
    run, split = finished_run[0].path, "validation[:3]"
    truth = coco_ground_truth(validation)
    path.write_text(json.dumps(truth))
    first = coco_ground_truth(open_dataset(load_run(run)[1].data, split))
    found.write_text(json.dumps(_perfect(first)))
    subset = evaluate_file(run, found, split=split, annotations=str(path))
    assert subset.images == 3
    assert subset.metrics["AP"] == pytest.approx(
        1.0
    )  # the other three images do not count as missed
    assert evaluate_file(run, found, annotations=str(path)).metrics["AP"] < 1
    gone = truth["images"][0]["id"]
    others = [a for a in truth["annotations"] if a["image_id"] != gone]
    path.write_text(json.dumps({**truth, "images": truth["images"][1:], "annotations": others}))
    with pytest.raises(ConfigError, match=rf"^data.annotations: 1 images, .* {gone}, are not in d"):
        evaluate(run, annotations=str(path))
    extra = {"id": 999, "width": 9, "height": 9}
    path.write_text(json.dumps({**truth, "images": [*truth["images"], extra]}))
    with pytest.raises(ConfigError, match="999, are not in the data set"):
        evaluate(run, annotations=str(path))


def _perfect(truth):
    return [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]


def test_a_perfect_network_finds_the_annotated_boxes_in_the_original_pixels(
    dataset_dir, validation, monkeypatch
):
    config = tiny_config(dataset_dir)
    read = [loaded.batch for loaded in validation_batches(validation, config)]
    known = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *read)

    def apply_perfectly(model, params, batch_stats, inputs, *, train):
        """Looks the images up, as it is given no boxes."""
        same = inputs.images[:, None] == known.images[None]  # [b, N, H, W, 3]
        number = same.all(axis=(2, 3, 4)).argmax(axis=1)
        classes, deltas = make_targets(jax.tree.map(lambda x: x[number], known), config)
        logits = jnp.where(classes[..., None] == jnp.arange(3)[None, None], 9.0, -9.0)
        sizes = level_sizes(inputs.padded_size, model.anchors_per_cell)
        return (split_levels(logits, sizes), split_levels(deltas, sizes)), {}

    monkeypatch.setattr("ghm_jax.detection.outputs.apply_network", apply_perfectly)
    variables = {"params": {"unused": jnp.zeros(1)}, "batch_stats": {}}
    detector = Detector(config, len(validation.class_names), choose_devices(2))
    results = detect(detector, config, validation, variables, Silent())

    truth = coco_ground_truth(validation)
    annotations = [a for a in truth["annotations"] if not a["iscrowd"]]
    assert len(results) == len(annotations)
    for annotation in annotations:
        match = min(
            (r for r in results if r["image_id"] == annotation["image_id"]),
            key=lambda r: np.abs(np.subtract(r["bbox"], annotation["bbox"])).sum(),
        )
        assert match["category_id"] == annotation["category_id"]
        np.testing.assert_allclose(match["bbox"], annotation["bbox"], atol=5e-3)
    assert score(truth, results)[0]["AP"] == pytest.approx(1.0)


def test_what_cannot_be_evaluated_is_refused_in_one_line(finished_run, tmp_path):
    with pytest.raises(ConfigError, match="not a run"):
        evaluate(tmp_path)
    with pytest.raises(ConfigError, match=r"^data.validation_split: squares has no split 'test'"):
        evaluate(finished_run[0].path, split="test")
    copy = tmp_path / "run"
    shutil.copytree(finished_run[0].path, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    with pytest.raises(ConfigError, match="no checkpoint; train") as refused:
        evaluate(copy)
    assert "\n" not in str(refused.value)
    (copy / "checkpoints").rmdir()
    with pytest.raises(ConfigError, match="no checkpoint yet; train"):
        evaluate(copy)

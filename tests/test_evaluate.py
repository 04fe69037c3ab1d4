"""Scores are those of pycocotools; what a run's evaluation writes can be read by it as well."""

import contextlib
import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import Listener, tiny_config

from ghm_jax.config import ConfigError, Run
from ghm_jax.data import coco_ground_truth, open_dataset
from ghm_jax.evaluate import METRICS, detect, evaluate, load_ground_truth, score
from ghm_jax.parallel import choose_devices
from ghm_jax.progress import Silent
from ghm_jax.rundir import RunDirectory, load_run
from ghm_jax.step import make_targets

pytestmark = pytest.mark.usefixtures("quick_compilation")
both_evaluators = pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])


@pytest.fixture(scope="module")
def evaluated_run(finished_run, tmp_path_factory):
    """A copy of the finished run, evaluated: its directory, what came back, its listener."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(finished_run[0].path, path)
    listener = Listener()
    with pytest.MonkeyPatch.context() as patch:
        # A network this young is sure of nothing: without a threshold it finds something.
        patch.setattr("ghm_jax.evaluate.load_run", lambda p: with_threshold(p, 0.0))
        result = evaluate(path, progress=listener)
    return RunDirectory(path), result, listener


def with_threshold(path, threshold):
    run, config = load_run(path)
    predict = dataclasses.replace(config.predict, score_threshold=threshold)
    return run, dataclasses.replace(config, predict=predict)


@pytest.fixture(scope="module")
def validation(dataset_dir):
    return open_dataset(tiny_config(dataset_dir).data, "validation")


def random_truth(rng, num_images=7, num_classes=3):
    """COCO instances of all three areas, some of them crowds, an image and a class without any."""
    annotations = []
    for image in range(1, num_images):
        for _ in range(rng.integers(1, 9)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(200), 2))
            x, y = rng.uniform(0, 400, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 10 * int(rng.integers(1, num_classes)),
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "area": float(w * h),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    return {
        "images": [{"id": i + 1, "width": 640, "height": 640} for i in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": 10 * (i + 1), "name": f"c{i}"} for i in range(num_classes)],
    }


def random_detections(rng, truth):
    """Some boxes moved a little, some doubled, some missed, some of another class, and noise."""
    found = []
    for annotation in truth["annotations"]:
        for _ in range(rng.integers(0, 3)):
            x, y, w, h = annotation["bbox"]
            dx, dy, dw, dh = rng.normal(0, 0.1, 4)
            category = annotation["category_id"] if rng.random() < 0.8 else 10
            found.append((annotation["image_id"], category, x + w * dx, y + h * dy, w, h, dw, dh))
    for _ in range(20):
        found.append((int(rng.integers(1, 8)), 20, *rng.uniform(0, 300, 2), 50.0, 50.0, 0, 0))
    return [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [float(v) for v in (x, y, w * np.exp(dw), h * np.exp(dh))],
            "score": float(rng.random()),
        }
        for image, category, x, y, w, h, dw, dh in found
    ]


def perfect_detections(truth):
    return [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]


def pycocotools_figures(truth, results):
    """The twelve figures, by pycocotools alone. `results`: a list, or the path of a JSON."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **truth}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@both_evaluators
def test_the_ground_truth_itself_scores_one(rng, evaluator):
    truth = random_truth(rng)
    metrics, per_class = score(truth, perfect_detections(truth), evaluator)
    assert tuple(metrics) == tuple(METRICS)
    assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == pytest.approx(1.0)
    assert metrics["AR100"] == pytest.approx(1.0)
    with_objects = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}
    assert per_class == pytest.approx(
        {c["name"]: 1.0 if c["id"] in with_objects else -1.0 for c in truth["categories"]}
    )


@both_evaluators
def test_figures_are_those_of_pycocotools(rng, evaluator):
    truth = random_truth(rng)
    results = random_detections(rng, truth)
    metrics, per_class = score(truth, results, evaluator)
    np.testing.assert_allclose(
        list(metrics.values()), pycocotools_figures(truth, results), atol=1e-6
    )
    assert 0 < metrics["AP"] < 1
    for category in truth["categories"]:  # the figures of a data set of this class alone
        of_class = [r for r in results if r["category_id"] == category["id"]]
        annotations = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        alone = {**truth, "categories": [category], "annotations": annotations}
        expected = pycocotools_figures(alone, of_class)[0] if of_class else -1.0
        assert per_class[category["name"]] == pytest.approx(expected, abs=1e-6)


@both_evaluators
def test_detecting_nothing_scores_zero(rng, evaluator):
    truth = random_truth(rng)
    metrics, _ = score(truth, [], evaluator)
    assert metrics["AP"] == metrics["AR100"] == 0.0


@both_evaluators
def test_without_any_object_no_figure_is_given(rng, evaluator):
    truth = {**random_truth(rng), "annotations": []}
    for results in ([], [{"image_id": 1, "category_id": 10, "bbox": [0, 0, 9, 9], "score": 0.5}]):
        metrics, per_class = score(truth, results, evaluator)
        assert set(metrics.values()) == set(per_class.values()) == {-1.0}


def test_metrics_json_holds_fractions_and_what_was_scored(evaluated_run):
    run, result, listener = evaluated_run
    assert json.loads(run.metrics.read_text()) == result
    assert set(METRICS) < result.keys()
    assert 0 <= result["AP"] <= result["AP50"] <= 1
    assert result["per_class"].keys() == {"dark", "light", "absent"}
    assert result["per_class"]["absent"] == -1.0
    assert (result["step"], result["split"], result["images"]) == (6, "validation", 6)
    assert (result["evaluator"], result["ground_truth"]) == ("hotcoco", "tfds:squares")
    assert listener.steps == [4, 6]  # of the last batch two count
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
    np.testing.assert_allclose([result[key] for key in METRICS], figures, atol=1e-6)


def test_the_report_is_written(evaluated_run):
    html = evaluated_run[0].report.read_text()
    assert html.lstrip().lower().startswith("<!doctype html>")
    assert "squares" in html


def test_devices_and_wrapper_do_not_matter(finished_run, dataset_dir, validation):
    state = jax.tree.map(np.asarray, finished_run[1])
    output = state.params["class_head"]["output"]
    output = {**output, "kernel": 100 * output["kernel"]}  # scores that differ visibly
    params = {**state.params, "class_head": {"output": output}}
    variables = {"params": params, "batch_stats": state.batch_stats}
    found = []
    for count, wrapper in ((2, "pmap"), (1, "pmap"), (4, "shard_map")):
        config = tiny_config(dataset_dir, run=Run(wrapper=wrapper, workers=0))
        devices = choose_devices(count)
        found.append(detect(config, validation, variables, devices, Silent()))
    assert len(found[0]) > 20
    for other in found[1:]:
        assert len(other) == len(found[0])
        for a, b in zip(found[0], other, strict=True):
            assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
            np.testing.assert_allclose(a["score"], b["score"], atol=5e-5)
            np.testing.assert_allclose(a["bbox"], b["bbox"], atol=5e-3)


def test_a_perfect_network_finds_the_annotated_boxes_in_the_original_pixels(
    dataset_dir, validation, monkeypatch
):
    config = tiny_config(dataset_dir)

    def apply_perfectly(model, params, batch_stats, batch, *, train):
        classes, deltas = make_targets(batch, config)
        logits = jnp.where(classes[..., None] == jnp.arange(3)[None, None], 9.0, -9.0)
        return (logits, deltas), {}

    monkeypatch.setattr("ghm_jax.step._apply", apply_perfectly)
    variables = {"params": {}, "batch_stats": {}}
    results = detect(config, validation, variables, choose_devices(2), Silent())

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


def test_another_annotations_file_is_scored_against(dataset_dir, validation, tmp_path):
    truth = coco_ground_truth(validation)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({**truth, "annotations": truth["annotations"][:2]}))
    config = tiny_config(dataset_dir)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, annotations=str(path))
    )
    assert len(load_ground_truth(config, validation)["annotations"]) == 2

    path.write_text(json.dumps({**truth, "categories": truth["categories"][:2]}))
    with pytest.raises(ConfigError, match=r"^data.annotations: .*categories"):
        load_ground_truth(config, validation)
    path.unlink()
    with pytest.raises(ConfigError, match=r"^data.annotations: no file"):
        load_ground_truth(config, validation)


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

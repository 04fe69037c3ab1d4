"""Figures are those of pycocotools with either library; invalid results are refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from coco_oracle import pycocotools_figures
from tiny import tiny_config

from ghm_jax.data import coco_ground_truth, open_dataset
from ghm_jax.data.coco_fields import read_instances
from ghm_jax.evaluation.coco import METRICS, load_ground_truth, load_results, score
from ghm_jax.evaluation.validation import Validation
from ghm_jax.exceptions import ConfigError, DataError
from ghm_jax.progress import Silent

both_evaluators = pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])


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
@pytest.mark.parametrize("ids", ["from 0", "repeated", "missing", "negative", "shuffled"])
def test_figures_of_a_file_do_not_depend_on_its_object_ids(rng, tmp_path, evaluator, ids):
    truth = random_truth(rng)
    results = random_detections(rng, truth)
    expected = pycocotools_figures(truth, results)
    order = rng.permutation(len(truth["annotations"])).tolist()
    for annotation, place in zip(truth["annotations"], order, strict=True):
        named = {"from 0": place, "repeated": place // 3, "negative": place - 5}
        annotation["id"] = named.get(ids, place + 1)
        if ids == "missing":
            del annotation["id"]
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    metrics, _ = score(read_instances(path)._asdict(), results, evaluator)
    np.testing.assert_allclose(list(metrics.values()), expected, atol=1e-6)


@both_evaluators
def test_detecting_nothing_scores_zero(rng, evaluator):
    truth = random_truth(rng)
    metrics, _ = score(truth, [], evaluator)
    assert metrics["AP"] == metrics["AR100"] == 0.0


@both_evaluators
def test_without_any_object_every_figure_is_minus_one(rng, evaluator):
    truth = {**random_truth(rng), "annotations": []}
    for results in ([], [{"image_id": 1, "category_id": 10, "bbox": [0, 0, 9, 9], "score": 0.5}]):
        metrics, per_class = score(truth, results, evaluator)
        assert set(metrics.values()) == set(per_class.values()) == {-1.0}


@pytest.mark.parametrize("name", ["bccd", "coco_val2017_open", "deeppcb"])
def test_hotcoco_and_pycocotools_agree_on_real_ground_truth(rng, shared, name):
    truth = json.loads((shared / "data" / name / "instances_val.json").read_text())
    by_category = [a for a in truth["annotations"] if not a["iscrowd"]]
    results = []
    for annotation in by_category:
        for _ in range(rng.integers(0, 3)):
            box = np.float64(annotation["bbox"])
            box += rng.normal(0, 0.15, 4) * np.tile(box[2:], 2)
            other = by_category[rng.integers(len(by_category))]["category_id"]
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"] if rng.random() < 0.8 else other,
                    "bbox": np.abs(box).tolist(),
                    "score": round(float(rng.random()), 2),  # with many ties
                }
            )
    metrics, per_class = score(truth, results)
    np.testing.assert_allclose(
        list(metrics.values()), pycocotools_figures(truth, results), atol=1e-6
    )
    reference = score(truth, results, "pycocotools")[1]
    assert per_class == pytest.approx(reference, abs=1e-6)
    assert 0 < metrics["AP"] < 1


def test_an_annotations_file_replaces_the_boxes_of_the_data_set(dataset_dir, validation, tmp_path):
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


def test_while_training_only_images_of_the_split_are_scored_against(dataset_dir, tmp_path):
    """An image that the file lists and the detector never sees is no missed one."""
    config = tiny_config(dataset_dir)
    path = tmp_path / "instances.json"

    def validate(split):
        data = dataclasses.replace(config.data, annotations=str(path), validation_split=split)
        changed = dataclasses.replace(config, data=data)
        return Validation(changed, jax.devices()[:2], Silent())

    truth = coco_ground_truth(open_dataset(config.data, "validation"))
    path.write_text(json.dumps(truth))
    validate("validation[:3]")
    more = [*truth["images"], {"id": 999, "width": 9, "height": 9}]
    path.write_text(json.dumps({**truth, "images": more}))
    validate("validation[:3]")
    with pytest.raises(ConfigError, match="999, are not in the data set"):
        validate("validation")
    path.write_text(json.dumps({key: truth[key] for key in ("images", "categories")}))
    with pytest.raises(ConfigError, match="has no annotations"):
        validate("validation")


GOOD = {"image_id": 101, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not JSON"),
        ("{}", "is not a list"),
        (json.dumps([GOOD, {**GOOD, "bbox": [1, 2, 3]}]), r"detections\[1\] has the bbox \["),
        (json.dumps([{**GOOD, "score": "high"}]), r"detections\[0\] has the score 'high'; it mu"),
        (json.dumps([{**GOOD, "score": 87.5}]), r"has the score 87.5; .*divide percentages by 100"),
        (json.dumps([{**GOOD, "score": float("nan")}]), r"detections\[0\] has the score nan"),
        (
            json.dumps([{k: v for k, v in GOOD.items() if k != "image_id"}]),
            r"detections\[0\] has no image_id; it must be",
        ),
        ("[3]", r"detections\[0\] is 3; it must be an object"),
        (json.dumps([GOOD, {**GOOD, "image_id": 4}]), r"detections\[1\] has the image_id 4, whi"),
        (json.dumps([{**GOOD, "category_id": 1}]), r"detections\[0\] has the category_id 1, wh"),
    ],
)
def test_an_invalid_results_file_is_one_line_that_names_the_row(validation, tmp_path, text, words):
    truth, path = coco_ground_truth(validation), tmp_path / "found.json"
    path.write_text(json.dumps([GOOD]))
    assert load_results(path, truth) == [GOOD]
    path.write_text(text)
    with pytest.raises(DataError, match=words) as refused:
        load_results(path, truth)
    assert "found.json" in str(refused.value)
    assert "\n" not in str(refused.value)

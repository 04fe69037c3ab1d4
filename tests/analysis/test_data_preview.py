"""What the inspection reports about a data set agrees with the annotations."""

import json

import cv2
import numpy as np
import pytest
from tiny import SIDE, Listener, tiny_config

from ghm_jax.analysis.data_preview import inspect_data
from ghm_jax.batch import NO_CLASS, Batch, GroundTruth
from ghm_jax.cli import main
from ghm_jax.cli.tables import inspection_table
from ghm_jax.config import Optimizer
from ghm_jax.data import coco_ground_truth, open_dataset
from ghm_jax.detection.anchors import make_anchors
from ghm_jax.plots.inspection import batch_picture, statistics_figure

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def inspected(dataset_dir, tmp_path_factory):
    """One batch that holds a complete epoch, so that expected values follow from the data set."""
    config = tiny_config(dataset_dir, optimizer=Optimizer(batch_size=10))
    listener, out = Listener(), tmp_path_factory.mktemp("inspection") / "new"
    inspection, files = inspect_data(config, out, batches=1, pictures=2, progress=listener)
    truth = coco_ground_truth(open_dataset(config.data, "train"))
    return config, inspection, files, truth, listener


def resized_boxes(truth):
    """[(size of the resized image, f64[N, 4])] of every image, long side 64 pixels."""
    for image in truth["images"]:
        boxes = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scale = SIDE / max(image["width"], image["height"])
        yield (image["height"] * scale, image["width"] * scale), boxes * scale


def iou(a, b):
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    inner = (high - low).clip(0).prod(axis=2)
    area = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return inner / (area[0][:, None] + area[1] - inner)


def test_statistics_are_those_of_the_annotations(inspected):
    _, inspection, _, truth, _ = inspected
    images = list(resized_boxes(truth))
    boxes = np.concatenate([b for _, b in images])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert sorted(inspection.boxes_per_image) == sorted(len(b) for _, b in images)
    padding = [1 - size[0] * size[1] / SIDE**2 for size, _ in images]
    np.testing.assert_allclose(sorted(inspection.padding), sorted(padding))
    np.testing.assert_allclose(sorted(inspection.sides), sorted(np.sqrt(width * height)), rtol=1e-5)
    np.testing.assert_allclose(sorted(inspection.aspect_ratios), sorted(height / width), rtol=1e-5)
    names = {category["id"]: category["name"] for category in truth["categories"]}
    labels = [names[a["category_id"]] for a in truth["annotations"]]
    assert inspection.class_counts == {name: labels.count(name) for name in names.values()}
    assert list(inspection.class_counts.values()) == sorted(
        inspection.class_counts.values(), reverse=True
    )
    assert inspection.shapes == {(SIDE, SIDE): 1}


def test_positive_anchors_are_those_that_overlap(inspected):
    config, inspection, _, truth, _ = inspected
    a = config.anchors
    anchors = make_anchors((SIDE, SIDE), a.scale, a.octaves, a.ratios).astype(np.float64)
    expected = []
    for (height, width), boxes in resized_boxes(truth):
        overlap = iou(anchors, boxes)
        # What claims a box: within the rounding of the float32 boxes.
        claims = (overlap >= overlap.max(axis=0, initial=0) - 1e-6) & (overlap > 0)
        positive = (claims | (overlap >= a.positive_iou)).any(axis=1)
        reach = np.ceil(np.array([width, height]) / 32) * 32
        center = (anchors[:, :2] + anchors[:, 2:]) / 2
        expected.append((positive & (center < reach).all(axis=1)).sum())
    assert abs(np.array(sorted(inspection.positives_per_image)) - sorted(expected)).max() <= 1
    assert inspection.positives_per_image.sum() > 10


def test_written_files_are_readable_and_consistent(inspected):
    _, inspection, files, _, listener = inspected
    assert [file.name for file in files] == ["batch_0.png", "statistics.png", "statistics.json"]
    for file in files[:2]:
        assert cv2.imread(str(file)).std() > 0
    saved = json.loads(files[2].read_text())
    assert saved["images"] == 10
    assert saved["boxes"] == len(inspection.labels)
    assert saved["boxes_of_class"] == inspection.class_counts
    sides = saved["quantiles"]["side of a box, pixels"]
    assert sides["0.5"] == pytest.approx(np.median(inspection.sides))
    assert sides["1"] == pytest.approx(inspection.sides.max())
    assert listener.steps == [1]


def test_the_table_has_every_quantity_and_sums_up_the_other_classes(inspected):
    _, inspection, *_ = inspected
    text = inspection_table(inspection, classes=1)
    assert "10 images, 1 without boxes" in text
    for name in inspection.rows:
        assert f"\n{name} " in text
    (rest,) = (line for line in text.splitlines() if "more classes" in line)
    counts = list(inspection.class_counts.values())
    assert rest.split()[:4] == ["2", "more", "classes", str(sum(counts[1:]))]


def test_a_picture_shows_boxes_and_crowds_in_place(rng):
    images = rng.integers(100, 120, (3, 96, 96, 3)).astype(np.uint8)
    boxes = np.zeros((3, 2, 4), np.float32)
    boxes[0, 0] = [24, 36, 72, 84]
    boxes[1, 1] = [0, 0, 96, 96]
    labels = np.array([[0, NO_CLASS], [NO_CLASS, NO_CLASS], [NO_CLASS, NO_CLASS]])
    truth = GroundTruth(boxes, labels, is_crowd=np.array([[False] * 2, [False, True], [False] * 2]))
    batch = Batch(images, np.full((3, 2), 96), np.arange(3), truth)
    grid = batch_picture(batch, ["a"], columns=2)
    assert grid.shape == (2 * 480 + 6, 2 * 480 + 6, 3)
    first, second, third = grid[:480, :480], grid[:480, 486:], grid[486:, :480]
    strong = np.abs(first.astype(int) - 110).max(axis=2) > 30
    rows, columns = np.flatnonzero(strong[:, 240]), np.flatnonzero(strong[300])
    assert (rows.min(), rows.max()) == (180, 419)
    assert (columns.min(), columns.max()) == (120, 359)
    assert np.abs(second[0, 240].astype(int) - 110).max() > 30  # the crowd's border
    assert np.abs(third.astype(int) - 110).max() < 30  # nothing drawn


@pytest.mark.parametrize("values", [[], [3], [0, 0, 0], [0.1, 50.0], [1, 2, 400], [0.25, 0.3]])
def test_any_values_can_be_drawn(values, tmp_path):
    figure = statistics_figure({"x": np.array(values, float)}, {}, title="")
    figure.savefig(tmp_path / "figure.png")
    drawn = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_data")]
    assert sum(patch.get_data().values.sum() for patch in drawn) == len(values)


def test_the_command_prints_the_table_and_the_files(dataset_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(
        f"from ghm_jax.config import *\n\nconfig = {tiny_config(dataset_dir)!r}\n"
    )
    main(["data", "inspect", "tiny.py", "--batches", "2", "--pictures", "1"])
    out = capsys.readouterr().out
    assert "8 images" in out
    for name in ("batch_0.png", "statistics.png", "statistics.json"):
        assert f"inspection/{name}" in out
        assert (tmp_path / "inspection" / name).is_file()
    assert not (tmp_path / "inspection" / "batch_1.png").exists()

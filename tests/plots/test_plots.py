"""Drawn boxes, figures, the HTML report, and the history that they show."""

import base64
import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from ghm_jax.plots import (
    Sample,
    class_color,
    draw_boxes,
    harmonizing_panel,
    loss_curves,
    render_report,
    sample_grid,
)
from ghm_jax.plots.figures import recent_histogram
from ghm_jax.runs.history import read_history

NAMES = ("zero", "one", "two")
MERIT = {
    **{"AP": 0.781, "AP50": 0.937, "AP75": 0.861, "APs": 0.712, "APm": 0.823, "APl": -1},
    **{"AR1": 0.204, "AR10": 0.805, "AR100": 0.842, "ARs": 0.803, "ARm": 0.886, "ARl": -1},
}


def make_sample(image_id=7, color=(60, 90, 120), scores=(0.9, 0.2)):
    return Sample(
        image_id=image_id,
        image=np.full((40, 60, 3), color, np.uint8),
        boxes=np.array([[4, 20, 20, 36]], np.float32),
        labels=np.array([1], np.int32),
        detected_boxes=np.array([[5, 20, 21, 36], [30, 5, 50, 25]], np.float32),
        detected_labels=np.array([1, 2], np.int32),
        detected_scores=np.array(scores, np.float32),
    )


def make_history(length=12, harmonized=("ghm_c", "ghm_r")):
    rng = np.random.default_rng(0)
    history = []
    for i in range(length):
        record = {"step": 10 * (i + 1), "loss": 2.0, "loss_class": 1.2, "loss_box": 0.8}
        record |= {"cross_entropy": 0.05 / (i + 1), "box_error": 0.2 / (i + 1)}
        record |= {"learning_rate": 0.01, "num_positive": 30.0, "grad_norm": 1.0}
        record |= {"images_per_second": 50.0}
        for key, bins in (("ghm_c", 30), ("ghm_r", 10)):
            if key in harmonized:
                counts = rng.integers(0, 50, bins).astype(float)
                weights = rng.uniform(0.1, 9, bins)
                record[key] = {"counts": counts.tolist(), "weights": weights.tolist()}
        history.append(record)
    return history


def make_report(**changes):
    arguments = {
        "title": "digits",
        "config": {"loss.classification": "ghm_c", "loss.ghm_c.min_count": 25.0},
        "history": make_history(),
        "figures_of_merit": MERIT,
        "per_class": {"zero": 0.5, "one": 0.25, "two": -1.0},
        "samples": [make_sample()],
        "class_names": NAMES,
        "facts": {"Device": "2 CPU cores"},
    }
    return render_report(**(arguments | changes))


# Drawing


def test_a_box_is_drawn_on_its_edge_pixels_and_nowhere_inside():
    canvas = draw_boxes(
        np.zeros((50, 40, 3), np.uint8), np.array([[2, 12, 10, 20]]), np.array([1]), NAMES, scale=3
    )
    assert canvas.shape == (150, 120, 3)
    color = class_color(1)
    # Pixel columns 2..9 and rows 12..19, three times as large.
    for edge in (
        canvas[36, 6:30], canvas[59, 6:30], canvas[36:60, 6], canvas[36:60, 29]
    ):  # fmt: skip
        assert (edge == color).all()
    assert not canvas[37:59, 7:29].any()
    assert not canvas[60:].any()
    assert not canvas[36:60, 30:].any()
    assert not canvas[36:60, :6].any()


def test_a_box_that_leaves_the_image_is_clipped_at_its_border():
    image = np.zeros((60, 60, 3), np.uint8)
    canvas = draw_boxes(image, np.array([[-9, 40, 30, 99]]), np.array([0]), NAMES)
    assert (canvas[59, :30] == class_color(0)).all()
    assert (canvas[40:, 0] == class_color(0)).all()
    assert not canvas[41:59, 30:].any()


@pytest.mark.parametrize(
    "box",
    [
        (70, 5, 90, 20),
        (5, -30, 20, -10),
        (10, 10, 10, 30),
        (30, 10, 20, 30),
        (np.nan, 0, 9, 9),
        (0, 0, np.inf, 9),
    ],
)
def test_a_box_without_area_in_the_image_is_not_drawn(box):
    image = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw_boxes(image, np.array([box]), np.array([0]), NAMES), image)


def test_without_boxes_the_image_is_unchanged_and_the_input_is_never_modified():
    image = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    before = image.copy()
    none = draw_boxes(image, np.zeros((0, 4)), np.zeros(0, int), NAMES, np.zeros(0))
    np.testing.assert_array_equal(none, image)
    draw_boxes(image, np.array([[1, 1, 20, 20]]), np.array([0]), NAMES)
    np.testing.assert_array_equal(image, before)


def test_the_highest_score_is_drawn_on_top():
    image = np.zeros((80, 80, 3), np.uint8)
    boxes, labels = np.array([[20.0, 30, 70, 70]] * 2), np.array([0, 2])
    for scores, top in (((0.9, 0.4), 0), ((0.4, 0.9), 2)):
        canvas = draw_boxes(image, boxes, labels, NAMES, np.array(scores))
        assert (canvas[69, 20:70] == class_color(top)).all()


def test_a_label_without_a_name_is_drawn():
    image = np.zeros((60, 60, 3), np.uint8)
    assert draw_boxes(image, np.array([[9, 30, 30, 50]]), np.array([99]), NAMES).any()


def test_class_colors_differ_and_are_light_enough_for_black_text():
    colors = np.array([class_color(label) for label in range(80)])
    assert len(np.unique(colors, axis=0)) == 80
    assert (colors @ (0.299, 0.587, 0.114)).min() > 120
    near = np.abs(colors[:10, None] - colors[None, :10]).sum(-1) + 999 * np.eye(10)
    assert near.min() > 60


def test_wrong_arrays_are_refused():
    image, box = np.zeros((9, 9, 3), np.uint8), np.zeros((1, 4))
    with pytest.raises(ValueError, match="uint8"):
        draw_boxes(image.astype(np.float32), box, np.zeros(1, int), NAMES)
    with pytest.raises(ValueError, match=r"\[N, 4\]"):
        draw_boxes(image, box, np.zeros(2, int), NAMES)
    with pytest.raises(ValueError, match=r"\[N, 4\]"):
        draw_boxes(image, box, np.zeros(1, int), NAMES, np.zeros(3))


def test_the_grid_shows_truth_at_the_left_and_detections_at_the_right():
    grid = sample_grid([make_sample()], NAMES)
    half = grid.shape[1] // 2
    # 60 x 40 pixels are drawn eight times as large. Row 30 runs through the boxes of class 1, row
    # 15 through the detection of class 2 whose score is too low.
    color = np.array(class_color(1))
    assert (grid[8 * 30, 8 * 4] == color).all()
    assert (grid[8 * 30, 480 + 8 + 8 * 5] == color).all()
    assert not (grid[8 * 30, 480 + 8 + 8 * 4] == color).all()
    assert not (grid[: 8 * 40, half:] == class_color(2)).all(-1).any()
    assert (sample_grid([make_sample()], NAMES, min_score=0.1) == class_color(2)).all(-1).any()


def test_the_grid_has_rows_and_columns_and_takes_images_of_any_size():
    small = make_sample()
    one, three = sample_grid([small], NAMES), sample_grid([small] * 3, NAMES, columns=2)
    assert three.shape[1] == 2 * one.shape[1] + 8
    assert three.shape[0] == 2 * one.shape[0] + 8
    np.testing.assert_array_equal(three[: one.shape[0], : one.shape[1]], one)

    large = Sample(**(vars(small) | {"image": np.zeros((1333, 800, 3), np.uint8)}))
    tiny = Sample(**(vars(small) | {"image": np.zeros((3, 2, 3), np.uint8)}))
    assert max(sample_grid([large, small, tiny], NAMES, columns=3).shape) < 4000
    with pytest.raises(ValueError, match="at least one"):
        sample_grid([], NAMES)


# Figures


def steps_of(ax):
    return [patch.get_data() for patch in ax.patches]


def test_the_panel_shows_the_normalized_histograms():
    counts = np.array([900.0, 60, 0, 30, 10])
    weights = np.array([0.1, 2.0, 7.0, 3.0, 5.0])
    top, bottom = harmonizing_panel(counts, weights, "GHM-C", "gradient norm").axes
    before, after = steps_of(top)
    np.testing.assert_allclose(before.values, counts / 1000)
    np.testing.assert_allclose(after.values, np.array([90, 120, 0, 90, 50]) / 350)
    np.testing.assert_allclose(before.edges, [0, 0.2, 0.4, 0.6, 0.8, 1])
    (weight,) = steps_of(bottom)
    np.testing.assert_allclose(weight.values, [0.1, 2.0, np.nan, 3.0, 5.0])
    assert top.get_yscale() == bottom.get_yscale() == "log"
    assert bottom.get_xlabel() == "gradient norm"


def test_weights_that_balance_the_density_give_a_level_line():
    counts = np.array([4000.0, 40, 7, 500])
    top, _ = harmonizing_panel(counts, 1 / counts, "", "g").axes
    np.testing.assert_allclose(steps_of(top)[1].values, 0.25)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("length", [0, 1, 2, 300])
def test_figures_draw_whatever_the_run_has_logged(length, tmp_path):
    history = make_history(length)
    if length > 2:
        history[1]["loss"] = float("nan")
        del history[2]["box_error"]
    loss_curves(history).savefig(tmp_path / "curves.png", dpi=40)
    harmonizing_panel([0.0] * 10, [0.0] * 10, "", "g").savefig(tmp_path / "empty.png", dpi=40)
    harmonizing_panel([5.0], [1.0], "", "g").savefig(tmp_path / "one.png", dpi=40)


def test_curves_show_the_logged_values():
    history = make_history(5)
    del history[3]["cross_entropy"]
    figure = loss_curves(history)
    drawn = {
        (ax.get_title("left"), line.get_label()): line.get_xydata()
        for ax in figure.axes
        for line in ax.lines
    }
    np.testing.assert_allclose(drawn["Loss", "classes"], [[10 * i, 1.2] for i in range(1, 6)])
    np.testing.assert_allclose(drawn["Loss", "boxes"][:, 1], 0.8)
    (plain,) = (line for (title, _), line in drawn.items() if title == "Plain cross-entropy")
    np.testing.assert_allclose(plain[:, 1], [0.05, 0.05 / 2, 0.05 / 3, np.nan, 0.05 / 5])


def test_long_histories_get_a_running_mean_over_the_raw_values():
    history = make_history(400)
    values = np.random.default_rng(1).normal(1, 0.1, 400)
    for record, value in zip(history, values, strict=True):
        record["box_error"] = value
    raw, smooth = loss_curves(history).axes[2].lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    expected = [values[max(0, i - 5) : i + 6].mean() for i in range(400)]
    np.testing.assert_allclose(smooth.get_ydata(), expected)


def test_the_histogram_is_averaged_over_the_last_records():
    history = [*make_history(15), {"step": 160, "loss": 1.0}]
    counts, weights, steps = recent_histogram(history, "ghm_r")
    assert steps == list(range(60, 151, 10))
    c = np.array([record["ghm_r"]["counts"] for record in history[5:15]])
    w = np.array([record["ghm_r"]["weights"] for record in history[5:15]])
    np.testing.assert_allclose(counts, c.sum(0) / 10)
    np.testing.assert_allclose(weights, (c * w).sum(0) / c.sum(0))
    assert recent_histogram([{"step": 1}], "ghm_r") is None


# Report


class Page(HTMLParser):
    VOID = frozenset(("meta", "img", "br", "link", "input", "hr"))

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_and_loads_nothing():
    text = make_report()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not set(page.tags) & {"script", "link", "iframe", "object"}
    assert "@import" not in text
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "viewport" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_names_every_figure_and_every_card():
    words = " ".join(Page(make_report()).words)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        assert f"{name} " in words
    for name in ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"):
        assert f"{name} " in words
    for meaning in ("AP of small objects", "AP of medium objects", "AP of large objects"):
        assert meaning in words
    for value in MERIT.values():
        assert (f"{value:.3f}" if value >= 0 else "–") in words
    assert "-1" not in words
    for heading in ("GHM-C", "GHM-R", "Training", "Validation images", "Settings", "2 CPU cores"):
        assert heading in words
    assert "fewer than 25 examples" in words
    assert "loss.ghm_c.min_count" in words


def test_the_page_shows_no_floor_for_the_published_losses():
    text = make_report(config={"loss.ghm_c.density": "histogram", "loss.ghm_c.min_count": 0.0})
    assert "floor" not in text


@pytest.mark.parametrize("field", ["title", "config", "facts", "per_class"])
def test_texts_are_escaped(field):
    bad = '<script>alert("1")</script>&'
    value = {"title": bad, "config": {bad: bad}, "facts": {bad: bad}, "per_class": {bad: 0.5}}
    text = make_report(history=[], **{field: value[field]})
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert Page(text).open == []


def test_a_run_without_harmonized_losses_still_has_a_page():
    for harmonized in ((), ("ghm_r",)):
        text = make_report(history=make_history(harmonized=harmonized), config={})
        assert Page(text).open == []
        assert "GHM-C" not in text
        assert ("GHM-R" in text) == ("ghm_r" in harmonized)


def test_a_run_without_history_samples_or_classes_still_has_a_page():
    text = make_report(history=[], samples=[], per_class=None, facts={}, config={})
    assert Page(text).open == []
    assert "0.781" in text


def test_pictures_keep_their_colors():
    text = make_report(samples=[make_sample(color=(200, 40, 10))], history=[])
    data = re.search(r'src="data:image/jpeg;base64,([^"]+)"', text)
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data[1]), np.uint8), cv2.IMREAD_COLOR)
    blue_green_red = np.median(picture[:320, :480], axis=(0, 1))
    np.testing.assert_allclose(blue_green_red, (10, 40, 200), atol=4)


def test_the_page_stays_small_with_noisy_images():
    image = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    samples = [Sample(**(vars(make_sample(i)) | {"image": image})) for i in range(12)]
    assert len(make_report(samples=samples, history=[]).encode()) < 2_500_000
    # The figures, with one record for each 50 steps of a COCO run.
    assert len(make_report(samples=[], history=make_history(1760)).encode()) < 500_000


def test_the_page_is_the_same_each_time():
    assert make_report() == make_report()


# History


def test_a_truncated_line_is_tolerated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = make_history(3)
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n" + lines[0][: len(lines[0]) // 2])
    assert read_history(path) == records
    path.write_bytes("\n".join(lines).encode() + b"\n\x00\x00\xff\n3\n[]\n")
    assert read_history(path) == records
    path.write_text("")
    assert read_history(path) == []


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [(10, 1.0), (20, 2.0), (30, 3.0), (15, 4.0), (25, 5.0)]
    path.write_text("".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in steps))
    assert [(r["step"], r["loss"]) for r in read_history(path)] == [(10, 1), (15, 4), (25, 5)]


def test_a_missing_history_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path / "metrics.jsonl")

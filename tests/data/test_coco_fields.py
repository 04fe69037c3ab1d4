"""Every field of a COCO file has one meaning on every way in, or is refused in one line.

The meaning is written down once more in `meant`, from docs/data.md and for values that json gives;
figures come from pycocotools alone.
"""

import copy
import json
import math
import os

import cv2
import numpy as np
import pytest
from coco_oracle import pycocotools_figures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Listener

from ghm_jax.config import Config, Data
from ghm_jax.data import coco_ground_truth, open_dataset, prepare_folder
from ghm_jax.evaluation.coco import load_ground_truth, load_results, score
from ghm_jax.exceptions import UserError

HEIGHT, WIDTH = 60, 80
NAMES = {3: "traffic light", 40: "Kätzchen 猫"}
fuzz = settings(
    max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def good():
    """Four images (the last without objects), six objects, one of them a crowd region."""
    boxes = [[4, 6, 20.5, 10], [30, 20, 12, 30.25], [1, 1, 70, 50], [50, 2, 9, 9], [2, 40, 8, 8]]
    annotations = [
        {
            "id": i + 1,
            "image_id": 10 + i % 3,
            "category_id": list(NAMES)[i % 2],
            "bbox": box,
            "area": box[2] * box[3] / 2,
            "iscrowd": 0,
        }
        for i, box in enumerate([*boxes, [10, 10, 40, 40]])
    ]
    annotations[-1]["iscrowd"] = 1
    images = [
        {"id": 10 + i, "file_name": f"bild {i}.png", "width": WIDTH, "height": HEIGHT}
        for i in range(4)
    ]
    categories = [{"id": i, "name": name} for i, name in NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The images of `good`, and its data set `good`."""
    folder = tmp_path_factory.mktemp("coco")
    encoded = cv2.imencode(".png", np.full((HEIGHT, WIDTH, 3), 90, np.uint8))[1].tobytes()
    for image in good()["images"]:
        (folder / image["file_name"]).write_bytes(encoded)
    prepare(folder, good(), "good")
    return folder


def save(folder, content):
    path = folder / "instances.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def prepare(folder, content, name, listener=None):
    """The data set of a file, as ground truth."""
    splits = {"validation": (folder, save(folder, content))}
    prepare_folder(name, folder / "data", splits, progress=listener)
    return coco_ground_truth(open_dataset(data(folder, name), "validation"))


def data(folder, name="good", **changed):
    return Data(name=name, dir=str(folder / "data"), **changed)


def against_file(folder, content):
    """Ground truth by `data.annotations`, for the data set `good`."""
    config = Config(data=data(folder, annotations=str(save(folder, content))))
    return load_ground_truth(config, open_dataset(config.data, "validation"))


def refused(action, *words):
    """The action fails with one line that has these words."""
    with pytest.raises(UserError) as error:
        action()
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 400
    assert all(word in line for word in words), line


def change(path, value, content=None):
    """`good` with the value at (section, row, field) replaced; `...` removes it."""
    section, row, field = path
    content = copy.deepcopy(good() if content is None else content)
    if value is ...:
        del content[section][row][field]
    else:
        content[section][row][field] = value
    return content


NAN, INF = math.nan, math.inf
# field of the second annotation, value in the file, its meaning
ACCEPTED = [
    ("iscrowd", 0, 0),
    ("iscrowd", 1, 1),
    ("iscrowd", 1.0, 1),
    ("iscrowd", True, 1),
    ("iscrowd", False, 0),
    ("iscrowd", None, 0),
    ("iscrowd", NAN, 0),  # pandas' missing value
    ("iscrowd", ..., 0),
    ("area", 17, 17),
    ("area", 0, 0),
    ("area", 1e10, 1e10),
    *(("area", value, 12 * 30.25) for value in (None, ..., NAN, INF, -INF, -600, -1e300)),
    ("bbox", [30, 20, 12.0, 7], [30, 20, 12, 7]),
    ("category_id", 3.0, 3),
]


@pytest.mark.parametrize(("field", "value", "meaning"), ACCEPTED)
def test_a_value_has_one_meaning_on_every_way_in(folder, tmp_path, field, value, meaning):
    content = change(("annotations", 1, field), value)
    (of_file,) = (a for a in against_file(folder, content)["annotations"] if a["id"] == 2)
    assert of_file[field] == meaning
    for image in good()["images"]:
        (tmp_path / image["file_name"]).symlink_to(folder / image["file_name"])
    (prepared,) = (a for a in prepare(tmp_path, content, "x")["annotations"] if a["id"] == 2)
    expected = np.floor(meaning) if field == "area" else meaning
    np.testing.assert_allclose(prepared[field], expected, atol=1e-5)


REFUSED = [
    *(("annotations", "iscrowd", value) for value in ("0", "1", "false", "", 2, -1, 0.5, [0], {})),
    *(("annotations", "area", value) for value in ("600", True, [600], {}, 1e300, 1.1e10, 10**400)),
    *(("annotations", "id", value) for value in ("a", True, 1.5, 2**63, 2**70, [1], INF)),
    *(("annotations", "image_id", value) for value in ("11", True, ..., None, NAN, 2**31, [11])),
    *(("annotations", "category_id", value) for value in ("3", ..., None, NAN, -1, 2**63)),
    *(
        ("annotations", "bbox", value)
        for value in (
            ...,
            None,
            [],
            [1, 2, 3],
            [1, 2, 3, 4, 5],
            [1, 2, -3, 4],
            ["1", "2", "3", "4"],
            [True, 2, 3, 4],
            [1, 2, NAN, 4],
            [1, 2, INF, 4],
            [0, 0, 1e200, 1e200],
            [0, 0, 10**400, 1],
            [0, 0, 1e-200, 1e-200],
            "1 2 3 4",
            {},
        )
    ),
    *(("images", "id", value) for value in ("11", True, ..., None, -1, 2**31, 1.5)),
    *(("images", "file_name", value) for value in ("", 5, "a\nb.png", "\0", "\ud800")),
    *(("images", "width", value) for value in ("80", 0, -80, True, 80.5, 2**31, [80])),
    *(("categories", "id", value) for value in ("3", True, ..., None, -1, 2**63)),
    *(
        ("categories", "name", value)
        for value in (
            ...,
            None,
            "",
            " ",
            5,
            " a",
            "a ",
            "a\nb",
            "a\tb",
            "a\u2028b",
            "\ud800",
            "\x85",
        )
    ),
]


@pytest.mark.parametrize(("section", "field", "value"), REFUSED)
def test_a_value_against_its_rule_is_one_line_on_every_way_in(folder, section, field, value):
    content = change((section, 1, field), value)
    words = "instances.json", f"{section}[1] has", field, "it must be"
    refused(lambda: prepare(folder, content, "x"), *words)
    refused(lambda: against_file(folder, content), *words)
    assert not (folder / "data" / "x").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("ox", "ox"), "two classes have the names 'ox' and 'ox'"),
        (("traffic light", "traffic  light"), "two classes have the names"),
        (("traffic light", "traffic\u3000light"), "two classes have the names"),
    ],
)
def test_class_names_differ_in_more_than_white_space(folder, names, words):
    content = good()
    for category, name in zip(content["categories"], names, strict=True):
        category["name"] = name
    refused(lambda: prepare(folder, content, "x"), "instances.json", words)


def test_upper_and_lower_case_are_two_classes(folder):
    content = good()
    content["categories"][0]["name"], content["categories"][1]["name"] = "a", "A"
    truth = prepare(folder, content, "letters")
    assert [c["name"] for c in truth["categories"]] == ["a", "A"]


@pytest.mark.parametrize("text", ["dog\ncat\n", "traffic\nlight\ncat\n", "a\na\n", "x  y\nx y\n"])
def test_other_names_than_were_prepared_are_refused_when_opened(folder, tmp_path, text):
    """TFDS keeps the names in a text file; one that was empty is no line of it."""
    content = good()
    content["categories"] += [{"id": 50, "name": "ox"}] if text == "dog\ncat\n" else []
    for image in good()["images"]:
        (tmp_path / image["file_name"]).symlink_to(folder / image["file_name"])
    prepare(tmp_path, content, "x")
    (names,) = (tmp_path / "data").rglob("*.labels.txt")
    names.write_text(text)
    refused(lambda: open_dataset(data(tmp_path, "x"), "validation"), "prepare it again")


@pytest.mark.parametrize(
    ("section", "change_row", "words"),
    [
        ("images", {"id": 10}, "images[0] and images[1] have the same id, 10"),
        ("images", {"file_name": "bild 0.png"}, "have the same file_name, 'bild 0.png'"),
        ("categories", {"id": 3}, "categories[0] and categories[1] have the same id, 3"),
        ("annotations", {"image_id": 9}, "annotations[1] refers to image 9 and category 40, which"),
        ("annotations", {"category_id": 9}, "annotations[1] refers to image 11 and category 9"),
        ("annotations", {"bbox": [0, 0, 2e5, 2e5], "area": None}, "annotations[1] has no area"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(folder, section, change_row, words):
    content = good()
    content[section][1].update(change_row)
    refused(lambda: prepare(folder, content, "x"), "instances.json", words)
    refused(lambda: against_file(folder, content), "instances.json", words)


TEXT = json.dumps(good())
BROKEN = {
    "half of it": TEXT.encode()[:200],
    "empty": b"",
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "deep": b"[" * 100_000,
    "latin-1": TEXT.replace("bild", "\x01").encode("latin-1") + b"\xe9",
    "long number": b'{"images": ' + b"1" * 5000 + b"}",
    **{
        f"no {key}": json.dumps({k: v for k, v in good().items() if k != key}).encode()
        for key in ("images", "categories")
    },
    **{
        f"{key} is {value!r}": json.dumps({**good(), key: value}).encode()
        for key in ("images", "annotations", "categories")
        for value in (None, 5, {}, "", [5], [None])
    },
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_with_its_name(folder, kind):
    refused(lambda: prepare(folder, BROKEN[kind], "x"), "instances.json")
    refused(lambda: against_file(folder, BROKEN[kind]), "instances.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_any_unicode_encoding_of_json_is_read(folder, encoding):
    content = json.dumps(good(), ensure_ascii=False).encode(encoding)
    truth = against_file(folder, content)
    assert {c["id"]: c["name"] for c in truth["categories"]} == NAMES
    assert truth["annotations"] == good()["annotations"]
    assert prepare(folder, content, f"set_{encoding}".replace("-", "_"))["categories"]


@pytest.mark.parametrize(
    "ids", [range(6), [1, 2] * 3, [None] * 6, [5, None, 7, 8, 9, 3], [-4, 6, 2, 3, 4, 5], ...]
)
def test_evaluators_agree_whatever_the_ids_of_the_objects(folder, tmp_path, ids):
    """An object 0, two objects of one id, or none: all are found by their own boxes."""
    content = good()
    for annotation, new in zip(
        content["annotations"], range(6) if ids is ... else ids, strict=True
    ):
        annotation["id"] = new
        if ids is ...:
            del annotation["id"]
    for image in good()["images"]:
        (tmp_path / image["file_name"]).symlink_to(folder / image["file_name"])
    perfect = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in content["annotations"]
    ]
    for truth in (against_file(folder, content), prepare(tmp_path, content, "x")):
        assert len({a["id"] for a in truth["annotations"]} - {0}) == 6
        for evaluator in ("hotcoco", "pycocotools"):
            assert score(truth, perfect, evaluator)[0]["AP"] == pytest.approx(1)


@pytest.mark.parametrize("missing", [..., None, NAN])
def test_a_size_that_is_missing_is_that_of_the_image(folder, tmp_path, missing):
    content = change(("images", 1, "width"), missing)
    truth = against_file(folder, content)
    assert score(truth, results_of(good()))[0]["AP"] == pytest.approx(1)
    for image in good()["images"]:
        (tmp_path / image["file_name"]).symlink_to(folder / image["file_name"])
    sizes = {(i["width"], i["height"]) for i in prepare(tmp_path, content, "x")["images"]}
    assert sizes == {(WIDTH, HEIGHT)}


@pytest.mark.parametrize("missing", [..., None])
def test_images_need_file_names_only_where_the_files_are_read(folder, missing):
    content = change(("images", 1, "file_name"), missing, change(("images", 2, "file_name"), ...))
    assert against_file(folder, content)["annotations"] == good()["annotations"]
    refused(lambda: prepare(folder, content, "x"), "instances.json: images[1] has no file_name")


def test_ids_that_will_do_are_kept(folder):
    content = good()
    for annotation, new in zip(content["annotations"], (7, 900, 3, 2**62, 5, 1), strict=True):
        annotation["id"] = new
    found = against_file(folder, content)["annotations"]
    assert [a["id"] for a in found] == [7, 900, 3, 2**62, 5, 1]


def relative(content):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
    return content


def test_boxes_divided_by_width_and_height_are_refused_on_every_way_in(folder):
    words = "all boxes lie within 1 x 1 pixels", "multiply"
    refused(lambda: prepare(folder, relative(good()), "x"), "instances.json", *words)
    refused(lambda: against_file(folder, relative(good())), "instances.json", *words)
    results = relative({"annotations": results_of(good())})["annotations"]
    refused(lambda: read_results(folder, results), "found.json", *words)


def test_one_small_box_or_one_without_width_is_no_fraction(folder):
    content = change(("annotations", 1, "bbox"), [0, 0, 1, 1])
    assert against_file(folder, content)["annotations"]
    content["annotations"] = [content["annotations"][1] | {"bbox": [0, 0, 0, 5]}]
    assert against_file(folder, content)["annotations"]


def warnings_of(folder, tmp_path, content):
    for image in good()["images"]:
        (tmp_path / image["file_name"]).symlink_to(folder / image["file_name"])
    listener = Listener()
    prepare(tmp_path, content, "x", listener)
    return listener.lines, open_dataset(data(tmp_path, "x"), "validation")


def test_boxes_that_nothing_can_find_are_counted_in_a_warning(folder, tmp_path):
    content = good()
    content["annotations"][0]["bbox"] = [200, 200, 30, 20]
    content["annotations"][1]["bbox"] = [70, 50, 60, 60]
    content["annotations"][2]["bbox"] = [-30, 5, 30, 20]  # its end is the border
    content["annotations"][3]["bbox"] = [5, 5, 0, 4]  # no area to find: a doctor's matter
    (clipped, outside), dataset = warnings_of(folder, tmp_path, content)
    assert clipped.startswith("warning: validation: 1 boxes reach beyond their image")
    assert outside.startswith("warning: validation: 2 boxes lie outside their image, the first in ")
    assert "bild 0.png" in outside
    assert not dataset.like_corners


def test_boxes_given_as_corners_are_warned_of(folder, tmp_path):
    content = good()
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    (line,), dataset = warnings_of(folder, tmp_path, content)
    assert line.startswith("warning: validation: the boxes look like x0, y0, x1, y1")
    assert dataset.like_corners


def test_good_boxes_are_not_warned_of(folder, tmp_path):
    lines, dataset = warnings_of(folder, tmp_path, good())
    assert lines == []
    assert not dataset.like_corners


# Detections


def results_of(truth):
    keys = ("image_id", "category_id", "bbox")
    return [{key: a[key] for key in keys} | {"score": 0.5} for a in truth["annotations"]]


def read_results(folder, rows):
    path = folder / "found.json"
    path.write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows).encode())
    return load_results(path, good())


def test_detections_of_whole_floats_and_with_further_fields_are_read(folder):
    rows = results_of(good())
    given = [row | {"image_id": float(row["image_id"]), "caption": "", "id": "x"} for row in rows]
    assert read_results(folder, given) == rows
    assert read_results(folder, b"\xef\xbb\xbf" + json.dumps(given).encode()) == rows
    assert read_results(folder, []) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("score", value) for value in (..., None, "0.9", "high", True, [0.9], NAN, INF, -0.1, 2)),
        *(("image_id", value) for value in (..., None, "10", True, [10], {}, 10.5, 99)),
        *(("category_id", value) for value in (..., None, "3", True, [3], 3.5, -3, 4)),
        *(("bbox", value) for value in (..., None, [1, 2, 3], ["1", "2", "3", "4"], [1, 2, -3, 4])),
    ],
)
def test_a_detection_against_a_rule_is_one_line(folder, field, value):
    rows = change(("annotations", 1, field), value, {"annotations": results_of(good())})
    refused(
        lambda: read_results(folder, rows["annotations"]), "found.json", "detections[1] has", field
    )


# Fuzz: a good file, changed as people's files are.

VALUES = st.one_of(
    st.sampled_from(
        [None, ..., True, False, NAN, INF, -INF, "", "0", "1", "false", "a", " a", "a\n"]
    ),
    st.sampled_from([0, 1, -1, 2, 3, 10, 11, 40, 2**31, 2**53, 2**63, 2**70, -(2**70), 10**400]),
    st.sampled_from(
        [0.5, 1.0, 3.0, -600.0, 1e-200, 1e10, 1e200, 1e300, [], [1], {}, "\ud800", "猫"]
    ),
    st.lists(
        st.sampled_from(
            [0, 1, 5, 20.25, 60, 79, -5, -0.0, 300, NAN, 1e200, 1e-200, None, "5", True]
        ),
        min_size=3,
        max_size=5,
    ),
    st.lists(st.floats(0, 60), min_size=4, max_size=4),
    st.floats(0, 1),
)
FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1")


@st.composite
def changed_files(draw):
    """(bytes of a changed file, its content or None if it was cut off)."""
    content = good()
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(
            st.sampled_from(["value"] * 5 + ["column", "double", "drop", "turn", "section"])
        )
        # Most changes are to annotations.
        section = draw(st.sampled_from(["annotations"] * 4 + ["images", "categories"]))
        rows = content.get(section)
        if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
            continue
        row = draw(st.integers(0, len(rows) - 1))
        if kind in ("value", "column"):
            field = draw(st.sampled_from(FIELDS[section]))
            value = draw(VALUES)
            for each in rows if kind == "column" else [rows[row]]:
                each.pop(field, None)
                if value is not ...:
                    each[field] = value
        elif kind == "double":
            rows.append(dict(rows[row]))
        elif kind == "drop":
            del rows[row]
        elif kind == "turn":
            rows.reverse()
        else:
            content[section] = draw(st.sampled_from([None, 5, {}, [], [None], "x"]))
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    encoded = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    if draw(st.integers(0, 9)) == 0:
        return encoded[: draw(st.integers(0, len(encoded) - 1))], None
    return encoded, content


def meant(content):
    """COCO instances as the file means them, ids of objects from 1 on in the file's order."""
    annotations = []
    for number, source in enumerate(content["annotations"], start=1):
        area = source.get("area")
        if area is None or not 0 <= area < INF:
            area = source["bbox"][2] * source["bbox"][3]
        crowd = source.get("iscrowd")
        kept = {key: source[key] for key in ("image_id", "category_id", "bbox")}
        annotations.append(kept | {"id": number, "area": area, "iscrowd": int(crowd == 1)})
    return {**content, "annotations": annotations}


def noisy(truth, rng):
    """Detections near the objects, some twice, some of another class, with ties."""
    categories = [category["id"] for category in truth["categories"]]
    return [
        {
            "image_id": a["image_id"],
            "category_id": int(rng.choice(categories)) if rng.random() < 0.2 else a["category_id"],
            "bbox": np.abs(np.array(a["bbox"]) * rng.uniform(0.9, 1.1, 4)).tolist(),
            "score": round(float(rng.random()), 1),
        }
        for a in truth["annotations"]
        for _ in range(rng.integers(0, 3))
    ]


def accepted(action):
    """What the action returns; None if it refuses its input, which must be in one line."""
    try:
        return action()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 500
    return None


def without_ids(annotations):
    rows = [{k: v for k, v in a.items() if k not in ("id", "segmentation")} for a in annotations]
    return sorted(rows, key=repr)


@fuzz
@given(changed_files(), st.integers(0, 2**32 - 1))
def test_a_changed_file_means_what_it_says_or_is_one_line(folder, file, seed):
    encoded, content = file
    truth = accepted(lambda: against_file(folder, encoded))
    if truth is None or "annotations" not in truth:
        return
    assert content is not None
    expected = meant(content)
    assert without_ids(truth["annotations"]) == without_ids(expected["annotations"])
    assert [i["id"] for i in truth["images"]] == [i["id"] for i in expected["images"]]
    detections = noisy(expected, np.random.default_rng(seed))
    if not detections:
        return
    figures = pycocotools_figures(expected, detections)
    for evaluator in ("hotcoco", "pycocotools"):
        found, _ = score(truth, detections, evaluator)
        np.testing.assert_allclose(list(found.values()), figures, atol=1e-6)


@settings(fuzz, max_examples=max(1, fuzz.max_examples // 6))
@given(changed_files())
def test_what_is_prepared_from_a_changed_file_means_what_it_says(folder, tmp_path_factory, file):
    encoded, content = file
    place = tmp_path_factory.mktemp("fuzz")
    path = save(place, encoded)
    splits = {"validation": (folder, path)}
    if accepted(lambda: prepare_folder("x", place / "data", splits)) is None:
        assert not (place / "data").exists()
        return
    dataset = open_dataset(data(place, "x"), "validation")
    by_id = sorted(content["categories"], key=lambda row: row["id"])
    assert dataset.class_names == tuple(row["name"] for row in by_id)
    assert dataset.category_ids == tuple(row["id"] for row in by_id)
    found, expected = coco_ground_truth(dataset)["annotations"], meant(content)["annotations"]
    assert len(found) == len(expected)

    def key(row):
        x, y, w, h = row["bbox"]
        ends = np.clip([x, y, x + w, y + h], 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        whole = [row["image_id"], row["category_id"], row["iscrowd"], int(row["area"])]
        return [*map(int, whole), *ends.tolist()]

    np.testing.assert_allclose(
        sorted(map(key, found)), sorted(map(key, expected)), rtol=1e-6, atol=1e-4
    )


@fuzz
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from(["image_id", "category_id", "bbox", "score"]), VALUES
        ),
        max_size=2,
    ),
    st.sampled_from(ENCODINGS),
)
def test_changed_detections_are_scored_as_pycocotools_does_or_are_one_line(
    folder, changes, encoding
):
    rows = results_of(good())
    for number, field, value in changes:
        rows[number].pop(field, None)
        if value is not ...:
            rows[number][field] = value
    found = accepted(lambda: read_results(folder, json.dumps(rows).encode(encoding)))
    if found is None:
        return
    figures = pycocotools_figures(good(), rows)
    for evaluator in ("hotcoco", "pycocotools"):
        np.testing.assert_allclose(
            list(score(good(), found, evaluator)[0].values()), figures, atol=1e-6
        )

"""The one reader of COCO's JSON files: every field has one rule, whoever reads it.

Preparing data, ground truth to score against, detections in a file and the checks of data read
their fields here. What a file means is decided once; what is refused is one line that names the
file, the row, the field and its value. docs/data.md has the rules as a table.
"""

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghm_jax.exceptions import DataError
from ghm_jax.json_text import parse_json

MAX_AREA = 1e10
"""Square pixels: COCO's evaluators count an object for nothing if its area is larger."""
IN_FIRST_PIXEL = (
    "all boxes lie within 1 x 1 pixels, as if divided by width and height of their images",
    "multiply them by width and height",
)
LIKE_CORNERS = (
    "the boxes look like x0, y0, x1, y1: as x, y, width, height many reach beyond their image",
    "give COCO's x, y, width, height",
)
"""Problem and remedy; see `in_first_pixel` and `look_like_corners`."""
CORNER_SHARE = 0.1
"""Share of the boxes reaching beyond their image from which they may be corners."""
_PIXEL = 1.001  # a pixel, and what the rounding of float32 may add
# Controls, separators of lines and paragraphs, and halves of characters, which UTF-8 cannot hold.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Field(NamedTuple):
    """A field of a row, and its rule."""

    read: Callable[[Any], Any]
    """From the value in the file, None if it is missing, to its meaning. Raises ValueError."""
    rule: str
    """What the value must be; in the message."""


class Instances(NamedTuple):
    """A COCO instances file: rows with the keys that are named here, and no others."""

    images: list[dict[str, Any]]
    """id, file_name, width, height; "" and 0 if the file does not say them."""
    annotations: list[dict[str, Any]] | None
    """id, image_id, category_id, bbox, area, iscrowd (0 or 1), in the order of the file; None if it
    has none, as a list of test images."""
    categories: list[dict[str, Any]]
    """id, name; by id."""


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return value


def _is_missing(value: Any) -> bool:
    """NaN is what pandas writes where a value is missing."""
    return value is None or value != value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    """Reader of whole numbers, low <= value <= high; 3.0 is one."""

    def read(value: Any) -> int:
        if not low <= _number(value) <= high or value != int(value):
            raise ValueError
        return int(value)

    return read


def _object_id(value: Any) -> int | None:
    return None if _is_missing(value) else _whole(-(2**63), 2**63 - 1)(value)


def _side(value: Any) -> int:
    return 0 if _is_missing(value) else _whole(1, 2**31 - 1)(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or _NO_TEXT.search(value):
        raise ValueError
    return value


def _file_name(value: Any) -> str:
    return "" if value is None else _text(value)


def _class_name(value: Any) -> str:
    if _text(value) != value.strip():
        raise ValueError
    return value


def _bbox(value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError
    if not all(-(2**31) < _number(number) < 2**31 for number in value):
        raise ValueError
    width, height = value[2:]
    # Sides whose product is below the smallest number are a box to one evaluator only.
    if min(width, height) < 0 or (min(width, height) > 0 and width * height == 0):
        raise ValueError
    return list(value)


def _area(value: Any) -> float | None:
    if _is_missing(value) or _number(value) < 0 or value == float("inf"):
        return None
    if value > MAX_AREA:
        raise ValueError
    return value


def _crowd(value: Any) -> int:
    if _is_missing(value):
        return 0
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError
    return int(value)


def _score(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError
    return value


# Image ids are int32 in a batch, category ids unsigned in hotcoco, object ids int64 in a record.
_IMAGE_ID = Field(_whole(0, 2**31 - 1), "a whole number from 0 on that fits in 32 bits")
_CATEGORY_ID = Field(_whole(0, 2**63 - 1), "a whole number from 0 on that fits in 64 bits")
_BBOX = Field(_bbox, "x, y, width, height in pixels, four finite numbers, no negative size")
_SIDE = Field(_side, "a positive whole number of pixels, or missing")
_NAME = Field(_class_name, "a text without line breaks and without white space at its ends")
IMAGE: Mapping[str, Field] = {
    "id": _IMAGE_ID,
    "file_name": Field(_file_name, "a text without line breaks"),
    "width": _SIDE,
    "height": _SIDE,
}
CATEGORY: Mapping[str, Field] = {"id": _CATEGORY_ID, "name": _NAME}
ANNOTATION: Mapping[str, Field] = {
    "id": Field(_object_id, "a whole number that fits in 64 bits, or missing"),
    "image_id": _IMAGE_ID,
    "category_id": _CATEGORY_ID,
    "bbox": _BBOX,
    "area": Field(_area, f"a number of square pixels, at most {MAX_AREA:g}, or missing"),
    "iscrowd": Field(_crowd, "0, 1, false, true or missing"),
}
DETECTION: Mapping[str, Field] = {
    "image_id": _IMAGE_ID,
    "category_id": _CATEGORY_ID,
    "bbox": _BBOX,
    "score": Field(
        _score, "a number from 0 to 1 (apply the sigmoid to logits, divide percentages by 100)"
    ),
}


def read_json(path: Path) -> Any:
    """What a JSON file holds; UTF-8 with or without a byte order mark, UTF-16 or UTF-32.

    Raises:
        DataError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "give a file") from None
    except ValueError as error:
        raise DataError(str(path), str(error), "write it again") from None


def read_rows(
    path: Path, name: str, rows: Sequence[Any], fields: Mapping[str, Field]
) -> list[dict[str, Any]]:
    """These fields of every row, as they are meant.

    Args:
        path: the file.
        name: of the rows, in a message: `annotations` for annotations[3].
        rows: of the file.
        fields: to read; others are left out.

    Raises:
        DataError: a row that is not an object, or a value against its rule.
    """
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            problem = f"{name}[{number}] is {reprlib.repr(row)}"
            raise DataError(str(path), problem, f"it must be an object with {', '.join(fields)}")
        values = {}
        for field, (read, rule) in fields.items():
            try:
                values[field] = read(row.get(field))
            except ValueError:
                has = f"the {field} {reprlib.repr(row[field])}" if field in row else f"no {field}"
                problem = f"{name}[{number}] has {has}"
                raise DataError(str(path), problem, f"it must be {rule}") from None
        found.append(values)
    return found


def read_instances(path: Path) -> Instances:
    """A COCO instances file, or a list of test images.

    An area that is missing, negative or not finite is width x height of the box. Objects are
    numbered again if their ids are not unique numbers from 1 on; see `number_annotations`.

    Raises:
        DataError: no such file, not JSON, not in COCO's form, a value against the rule of its
            field, ids, file names or class names that are not unique, an object of an image or a
            category that is not listed, or boxes that look divided by width and height.
    """
    source = read_json(path)
    for name in ("images", "categories", "annotations"):
        rows = source.get(name) if isinstance(source, dict) else None
        optional = name == "annotations" and isinstance(source, dict) and name not in source
        if not optional and (not isinstance(rows, list) or not (rows or name == "annotations")):
            raise DataError(
                str(path),
                f"has no list {name!r}, or an empty one",
                "give a COCO instances JSON, with images, annotations and categories",
            )
    images = read_rows(path, "images", source["images"], IMAGE)
    categories = read_rows(path, "categories", source["categories"], CATEGORY)
    _check_unique(path, "images", images, "id", "renumber the images")
    _check_unique(path, "images", images, "file_name", "list every file once")
    _check_unique(path, "categories", categories, "id", "renumber the categories")
    if problem := class_names_problem([category["name"] for category in categories]):
        raise DataError(str(path), problem, "give every category a name of its own")
    annotations = None
    if "annotations" in source:
        annotations = read_rows(path, "annotations", source["annotations"], ANNOTATION)
        _check_annotations(path, annotations, images, categories)
        number_annotations(annotations)
    return Instances(images, annotations, sorted(categories, key=lambda row: row["id"]))


def _check_unique(
    path: Path, name: str, rows: list[dict[str, Any]], field: str, remedy: str
) -> None:
    first: dict[Any, int] = {}
    for number, row in enumerate(rows):
        other = first.setdefault(row[field], number)
        if other != number and row[field] != "":  # missing
            raise DataError(
                str(path),
                f"{name}[{other}] and {name}[{number}] have the same {field}, "
                f"{reprlib.repr(row[field])}",
                remedy,
            )


def _check_annotations(
    path: Path,
    annotations: list[dict[str, Any]],
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> None:
    """Checks annotations as a whole, and fills in missing areas."""
    image_ids, category_ids = ({row["id"] for row in rows} for rows in (images, categories))
    for number, row in enumerate(annotations):
        if row["image_id"] not in image_ids or row["category_id"] not in category_ids:
            raise DataError(
                str(path),
                f"annotations[{number}] refers to image {row['image_id']} and category "
                f"{row['category_id']}, which the file does not list",
                "add or remove them",
            )
        if row["area"] is None:
            row["area"] = row["bbox"][2] * row["bbox"][3]
        if row["area"] > MAX_AREA:
            raise DataError(
                str(path),
                f"annotations[{number}] has no area and the bbox {reprlib.repr(row['bbox'])}",
                f"width x height must be at most {MAX_AREA:g} square pixels",
            )
    check_scale(path, annotations)


def number_annotations(annotations: list[dict[str, Any]]) -> None:
    """Gives annotations (in place) ids that every evaluator takes: unique numbers from 1 on.

    pycocotools takes a match with object 0 for no match and looks objects up by id, hotcoco takes
    no negative ids. Ids that will do are kept; else all are numbered, in the order of their ids,
    or as they come if one of them is missing (None).
    """
    ids = [annotation["id"] for annotation in annotations]
    some_missing = None in ids
    if not some_missing and min(ids, default=1) > 0 and len(set(ids)) == len(ids):
        return
    order = annotations if some_missing else sorted(annotations, key=lambda row: row["id"])
    for number, annotation in enumerate(order, start=1):
        annotation["id"] = number


def check_scale(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises DataError if the boxes in a file look divided by width and height."""
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    real = boxes[(boxes[:, 2:] > 0).all(axis=1)]
    if len(real) and in_first_pixel(real[:, :2], real[:, :2] + real[:, 2:]).all():
        raise DataError(str(path), *IN_FIRST_PIXEL)


def in_first_pixel(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool[N]: boxes from f64[N, 2] to f64[N, 2], in pixels, within the first pixel of an image.
    If this holds for all that have an area, they are no pixels, but fractions of the image."""
    return np.all((start >= 1 - _PIXEL) & (end <= _PIXEL), axis=1)


def look_like_corners(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes are more likely x0, y0, x1, y1 than x, y, width, height.

    So it is if, read as COCO's, at least a tenth of them (`CORNER_SHARE`) reach more than a pixel
    over the right or lower border of their image, and every one of them, read as corners, is a box
    inside its image.

    Args:
        boxes: f64[N, 4], as in the file.
        sizes: f64[N, 2], width and height of the image of each.
    """
    if not len(boxes):
        return False
    beyond = (boxes[:, :2] + boxes[:, 2:] > sizes + 1).any(axis=1)
    corners = (boxes[:, 2:] >= boxes[:, :2]) & (boxes[:, :2] >= -1) & (boxes[:, 2:] <= sizes + 1)
    return bool(beyond.mean() >= CORNER_SHARE and corners.all())


def class_names_problem(names: Sequence[Any]) -> str:
    """What is wrong with class names, which must come back from a file as they went in; empty if
    nothing is. They must differ in more than the amount of white space; upper and lower case
    differ."""
    for name in names:
        try:
            _NAME.read(name)
        except ValueError:
            return f"the class name {reprlib.repr(name)} is not {_NAME.rule}"
    first: dict[str, str] = {}
    for name in names:
        spaced = " ".join(name.split())
        if spaced in first:
            return (
                f"two classes have the names {reprlib.repr(first[spaced])} and {reprlib.repr(name)}"
            )
        first[spaced] = name
    return ""

"""Checks data sets: reads records as TFDS stores them, before they become examples."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ghm_jax.analysis.doctor.finding import Finding, fault_of, guarded
from ghm_jax.config import Config, Data
from ghm_jax.data.batching import choose_bucket
from ghm_jax.data.coco_fields import (
    IN_FIRST_PIXEL,
    LIKE_CORNERS,
    MAX_AREA,
    in_first_pixel,
    read_instances,
)
from ghm_jax.data.dataset import Dataset, data_set_names, open_dataset
from ghm_jax.data.prepare.digit_scenes import DigitScenes
from ghm_jax.data.schema import COCO_CATEGORIES, classes_problem
from ghm_jax.data.transforms import decode_image, encoded_size, resized_size
from ghm_jax.exceptions import ConfigError, DataError
from ghm_jax.storage import as_path

_DECODED = 20  # images per split that are decoded; of the others only headers are read

_REMEDIES = {
    "undecodable": ("images that cannot be decoded", "replace them and prepare the data again"),
    "repeated": ("images whose id is used twice", "give every image a unique id"),
    "pixels": (
        "boxes outside [0, 1]",
        "boxes must be divided by width and height; prepare the data with ghm-jax data prepare",
    ),
    "inverted": (
        "boxes whose end is before their start",
        "the order must be ymin, xmin, ymax, xmax (in COCO files x, y, width, height)",
    ),
    "degenerate": (
        "boxes without width or height, which training drops",
        "remove them from the annotations, or ignore this line",
    ),
    "outside": (
        "boxes that lay outside their image: nothing can find them, evaluation counts them missed",
        "correct or remove them in the annotations and prepare the data again",
    ),
    "cut": (
        "objects with a larger area than their box, which ends at a border of the image: the box "
        "reached beyond it and was clipped",
        "correct the annotations and prepare the data again, or ignore this line",
    ),
    "area": (
        "objects with a larger area than their box",
        "the boxes look like x, y, width, height read as corners; prepare the data again",
    ),
    "uncounted": (
        "objects whose area is negative or so large that evaluators leave them out",
        "prepare the data again from its annotations",
    ),
    "label": ("labels without a class", "prepare the data again from its annotations"),
    "crowded": ("images with more objects than data.max_boxes", "raise `data.max_boxes`"),
    "large": ("images that fit in no bucket", "add a larger one to `data.buckets`"),
}
"""What is counted in the records: (problem, remedy)."""
_HARMLESS = ("degenerate", "crowded", "cut")
"""A few of them are normal: a fault only from 1% on."""


def examine_data(
    config: Config, chosen: bool, needed: bool, images: int, encoding: str = "utf-8"
) -> Iterator[Finding]:
    """Findings about the data of a config.

    Args:
        config: `data` says which.
        chosen: check only `data.name`, with the classes of the config; else all in `data.dir`.
        needed: missing data is a fault.
        images: most records to read per split.
        encoding: of the terminal.
    """
    data = config.data
    directory = as_path(data.dir)
    present = data_set_names(directory) if directory.is_dir() else []
    names = [data.name] if chosen and data.name else present
    if not names:
        said = f"no data set in {data.dir}" if directory.is_dir() else f"no directory {data.dir}"
        prepare = "ghm-jax data prepare makes one; experiments/quickstart.py makes its own"
        yield Finding(
            "data",
            not needed,
            f"{said} ({prepare})",
            "" if not needed else "set `data.dir` to where one is prepared, or prepare one",
        )
        return
    for name in names:
        if name == DigitScenes.name and name not in present:
            yield Finding("data", True, f"{name} is built when training starts")
            continue
        of_one = dataclasses.replace(data, name=name)
        if not chosen:
            of_one = dataclasses.replace(of_one, classes=(), annotations="")
        for split in dict.fromkeys((data.train_split, data.validation_split)):
            yield from guarded(
                f"{name} {split}", lambda d=of_one, s=split: _split(d, s, images, encoding)
            )


def _split(data: Data, split: str, images: int, encoding: str) -> Iterator[Finding]:
    what = f"{data.name} {split}"
    dataset = open_dataset(data, split)
    yield from _classes(what, dataset, data)
    yield from _printable(what, dataset, encoding)
    if data.annotations and split == data.validation_split:
        yield _annotations(what, dataset, data)
    found = _count(dataset, data, images)
    objects = found.labels.total()
    part = "" if found.images == len(dataset) else f" ({found.images} checked)"
    empty = found.problems["empty"]
    said = f"{len(dataset)} images{part}, {objects} objects, {empty} images without any"
    good = objects > 0
    remedy = "there is nothing to learn from: check the annotations" if not good else ""
    yield Finding(what, good, said, remedy)
    if 0 < objects == found.problems["crowd"]:
        said = "all objects are crowd regions: none is learned from, none counts in evaluation"
        yield Finding(what, False, said, "correct iscrowd and prepare the data again")
    if changed := found.problems["picture"]:
        said = (
            f"{changed} of {found.problems['pictures']} pictures in {dataset.folder} changed since "
            f"they were prepared (first: {found.picture})"
        )
        yield Finding(what, False, said, "delete the data set and prepare it again to use them")
    if dataset.like_corners:
        yield Finding(what, False, *LIKE_CORNERS)
    if 0 < found.problems["with area"] == found.problems["first pixel"]:
        yield Finding(what, False, *IN_FIRST_PIXEL)
        del found.problems["area"]  # areas in pixels are larger than such boxes
    for key, (problem, remedy) in _REMEDIES.items():
        number = found.problems[key]
        of = found.images if "images" in problem.split()[:1] else objects
        if number and not (key in _HARMLESS and number < 0.01 * of):
            yield Finding(what, False, f"{number} {problem} (image {found.example[key]})", remedy)
    unseen = [name for i, name in enumerate(dataset.class_names) if not found.labels[i]]
    if unseen and found.images == len(dataset) and split == data.train_split:
        listed = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        remedy = "label some, or remove the class from the annotations"
        yield Finding(what, False, f"{len(unseen)} classes without an object ({listed})", remedy)


def _classes(what: str, dataset: Dataset, data: Data) -> Iterator[Finding]:
    names, ids = dataset.class_names, dataset.category_ids
    problem = classes_problem(names, ids)
    if not problem and set(names) == set(COCO_CATEGORIES):
        wrong = [n for n, i in zip(names, ids, strict=True) if COCO_CATEGORIES[n] != i]
        problem = f"{wrong[0]} has a different id than in COCO" if wrong else ""
    if problem:
        yield Finding(what, False, problem, "prepare the data again from its annotations")
    elif data.classes and data.classes != names:
        said = f"classes are {', '.join(names[:5])} ..., not those of the run or experiment"
        yield Finding(what, False, said, "choose the data set that it was trained on")
    else:
        yield Finding(what, True, f"{len(names)} classes, ids {min(ids)} to {max(ids)}")


def _printable(what: str, dataset: Dataset, encoding: str) -> Iterator[Finding]:
    """Whether the terminal can print the class names; what it cannot becomes `?`."""
    lost = [n for n in dataset.class_names if n.encode(encoding, "replace").decode(encoding) != n]
    if lost:
        said = f"the terminal's encoding, {encoding}, cannot show {len(lost)} class names"
        yield Finding(what, False, f"{said} ({lost[0]})", "set PYTHONUTF8=1 and a UTF-8 locale")


def _annotations(what: str, dataset: Dataset, data: Data) -> Finding:
    """Whether the annotation file to score against belongs to this data set."""
    path = Path(data.annotations)
    if not path.is_file():
        return Finding(
            what, False, f"no file {path}", "set `data.annotations` to the instances JSON"
        )
    try:
        categories = read_instances(path).categories
    except DataError as error:
        return fault_of(what, error)
    names = {category["id"]: category["name"] for category in categories}
    if names != dict(zip(dataset.category_ids, dataset.class_names, strict=True)):
        remedy = "give the file that the data was prepared from"
        return Finding(what, False, f"{path}: different classes or category ids", remedy)
    return Finding(what, True, f"{path}: same classes and ids")


@dataclass
class _Counts:
    """What was found in the records of a split."""

    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    """Objects by label."""
    problems: Counter[str] = field(default_factory=Counter)
    """Problems by kind."""
    example: dict[str, int] = field(default_factory=dict)
    """An image id of each kind."""
    picture: str = ""
    """Name of the first picture that changed."""


def _count(dataset: Dataset, data: Data, images: int) -> _Counts:
    """Reads records of a split, at most `images` of them."""
    counts = _Counts()
    seen: set[int] = set()
    # Evenly spaced over the split, because errors come in clusters.
    places = np.unique(np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int))
    for place in places.tolist():
        record = dataset.source[place]
        image_id = int(record["image/id"])
        found = _problems(record, data, len(dataset.class_names), decode=len(seen) < _DECODED)
        found["repeated"] += image_id in seen
        seen.add(image_id)
        labels = np.asarray(record["objects"]["label"]).ravel().tolist()
        counts.labels.update(labels)
        found["empty"] += not labels
        if dataset.folder and (name := record["image/filename"].decode()):
            found += _picture(dataset.folder / name, record["image"])
            if found["picture"]:
                counts.picture = counts.picture or name
        for key in +found:
            counts.example.setdefault(key, image_id)
        counts.problems.update(found)
        counts.images += 1
    return counts


def _picture(path: Path, prepared: bytes) -> Counter[str]:
    """Whether a picture is still what was prepared from it; nothing if it is no longer there."""
    try:
        same = path.stat().st_size == len(prepared) and path.read_bytes() == prepared
    except OSError:
        return Counter()
    return Counter(pictures=1, picture=int(not same))


def _problems(
    record: Mapping[str, Any], data: Data, num_classes: int, *, decode: bool
) -> Counter[str]:
    """What is wrong with one record, by kind."""
    objects = record["objects"]
    boxes = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)  # y, x, y, x
    labels = np.asarray(objects["label"]).ravel()
    sides = boxes[:, 2:] - boxes[:, :2]
    area = np.asarray(objects["area"], np.float64).ravel()
    inverted = (sides < 0).any(axis=1)
    flat = (sides == 0).any(axis=1) & ~inverted
    at_border = (boxes <= 0) | (boxes >= 1)
    # A box that had an area, clipped to a line at the border.
    outside = flat & (area > 0) & ((sides == 0) & at_border[:, :2]).any(axis=1)
    # Tolerances, because TFDS stores float32.
    found = Counter(
        pixels=int(((boxes < -1e-3) | (boxes > 1.001)).any(axis=1).sum()),
        inverted=int(inverted.sum()),
        degenerate=int((flat & ~outside).sum()),
        outside=int(outside.sum()),
        uncounted=int(((area < 0) | (area > MAX_AREA)).sum()),
        crowd=int(np.asarray(objects["is_crowd"], bool).sum()),
        label=int(((labels < 0) | (labels >= num_classes)).sum()),
        crowded=int(len(boxes) > data.max_boxes),
    )
    try:
        height, width = encoded_size(record["image"])
        if decode:
            decode_image(record["image"])
    except ValueError:
        found["undecodable"] += 1
        return found
    of_box = sides.clip(0).prod(axis=1) * height * width
    # Areas are integers, of a mask or of the box; one pixel of rounding at each side is allowed.
    slack = 2 * (sides.clip(0) * (height, width)).sum(axis=1) + 4
    real = (sides > 0).all(axis=1)
    larger = real & (area > of_box + slack)
    found["cut"] = int((larger & at_border.any(axis=1)).sum())
    found["area"] = int((larger & ~at_border.any(axis=1)).sum())
    in_pixels = boxes * (height, width, height, width)
    found["with area"] = int(real.sum())
    found["first pixel"] = int((real & in_first_pixel(in_pixels[:, :2], in_pixels[:, 2:])).sum())
    with contextlib.suppress(ConfigError):
        choose_bucket(resized_size(height, width, data.short_side, data.long_side), data.buckets)
        return found
    found["large"] += 1
    return found

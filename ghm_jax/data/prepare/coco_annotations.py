"""COCO instances files, read and checked against their images."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ghm_jax.data.transforms import encoded_size
from ghm_jax.exceptions import DataError
from ghm_jax.progress import Progress, Silent


class AnnotatedImage(NamedTuple):
    """One image file and its annotations."""

    id: int
    file_name: str
    path: Path
    width: int
    height: int
    annotations: list[dict[str, Any]]
    """With the keys id, category_id, bbox (x, y, width, height in pixels), area, iscrowd."""


def read_split(
    split: str,
    directory: Path,
    annotations: Path,
    *,
    subset: float = 1.0,
    progress: Progress | None = None,
) -> tuple[dict[int, str], list[AnnotatedImage]]:
    """Reads one split, and the header of every image in it.

    Args:
        split: its name; if it begins with `test`, annotations are optional.
        directory: the directory that the file names of the images are relative to.
        annotations: COCO instances JSON.
        subset: fraction of the images, in (0, 1]. It depends on their ids alone, and a smaller
            subset is part of every larger one. The other images need not exist.
        progress: receives progress updates.

    Returns:
        {category id: name} in the order of ids, which is the order of labels; and the images.

    Raises:
        DataError: a missing file, or annotations that are not in COCO format or do not match the
            images.
    """
    source = _read_json(split, annotations)
    categories = _read_categories(split, source)
    entries = _read_entries(split, source)
    images = _read_images(split, directory, _choose(entries, subset), progress or Silent())
    for number, entry in enumerate(source["annotations"]):
        _check_annotation(split, number, entry, entries, categories)
        if entry["image_id"] in images:
            images[entry["image_id"]].annotations.append(_annotation(entry))
    for image in images.values():
        image.annotations.sort(key=lambda annotation: annotation["id"])  # as TFDS `coco` does
    return categories, list(images.values())


def _check_annotation(
    split: str,
    number: int,
    entry: Any,
    images: dict[int, dict[str, Any]],
    categories: dict[int, str],
) -> None:
    _, image_id, category_id, bbox = _fields(
        split, "annotations", number, entry, "id", "image_id", "category_id", "bbox"
    )
    if image_id not in images or category_id not in categories:
        raise DataError(
            split,
            f"annotations[{number}] refers to image {image_id} and category {category_id}, which "
            "the file does not list",
            "add or remove them",
        )
    if len(bbox) != 4 or not all(map(_is_number, bbox)) or min(bbox[2:]) < 0:
        raise DataError(
            split,
            f"annotations[{number}] has the bbox {bbox}",
            "it must be x, y, width, height in pixels",
        )


def _annotation(entry: dict[str, Any]) -> dict[str, Any]:
    """A checked entry of the JSON, with the keys of `AnnotatedImage.annotations`."""
    bbox, area = entry["bbox"], entry.get("area")
    return {
        "id": entry["id"],
        "category_id": entry["category_id"],
        "bbox": bbox,
        "area": area if _is_number(area) else bbox[2] * bbox[3],
        "iscrowd": bool(entry.get("iscrowd", 0)),
    }


def _read_json(split: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(split, f"no annotation file {path}", "give a COCO instances JSON")
    try:
        source = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(
            split, f"{path} is not JSON ({error})", "give a COCO instances JSON"
        ) from None
    if split.startswith("test") and isinstance(source, dict):
        source.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(source, dict) or not isinstance(source.get(key), list):
            raise DataError(
                split,
                f"{path} has no list {key!r}",
                "give a COCO instances JSON, with images, annotations and categories",
            )
    return source


def _read_categories(split: str, source: dict[str, Any]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(source["categories"]):
        category_id, name = _fields(split, "categories", number, entry, "id", "name")
        if category_id in categories or name in categories.values():
            raise DataError(
                split,
                f"two categories have the id {category_id} or the name {name!r}",
                "give every category a unique id and name",
            )
        categories[category_id] = name
    if not categories:
        raise DataError(split, "the annotations list no categories", "add at least one")
    return dict(sorted(categories.items()))


def _read_entries(split: str, source: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """{image id: its entry}"""
    entries: dict[int, dict[str, Any]] = {}
    file_names = set()
    for number, entry in enumerate(source["images"]):
        image_id, file_name = _fields(split, "images", number, entry, "id", "file_name")
        if image_id in entries or not 0 <= image_id < 2**31:
            raise DataError(
                split,
                f"the image id {image_id} occurs twice or does not fit in 32 bits",
                "renumber the images",
            )
        if file_name in file_names:
            raise DataError(
                split, f"two images have the file name {file_name!r}", "list every file once"
            )
        entries[image_id] = entry
        file_names.add(file_name)
    if not entries:
        raise DataError(split, "the annotations list no images", "add at least one")
    return entries


def _choose(entries: dict[int, dict[str, Any]], share: float) -> dict[int, dict[str, Any]]:
    """At least one image, and the same ones on every machine: those whose ids hash lowest."""
    order = sorted(entries, key=lambda image_id: hashlib.sha256(b"%d" % image_id).digest())
    chosen = set(order[: max(1, round(share * len(order)))])
    return {image_id: entry for image_id, entry in entries.items() if image_id in chosen}


def _read_images(
    split: str, directory: Path, entries: dict[int, dict[str, Any]], progress: Progress
) -> dict[int, AnnotatedImage]:
    images: dict[int, AnnotatedImage] = {}
    for image_id, entry in entries.items():
        path = directory / entry["file_name"]
        width, height = _size_of_file(split, path)
        stated = (entry.get("width", width), entry.get("height", height))
        if stated != (width, height):
            raise DataError(
                split,
                f"{path} has {width}x{height} pixels, but the annotations say "
                f"{stated[0]}x{stated[1]}",
                "save the image as it was annotated (orientation tags are not applied) or correct "
                "the annotations",
            )
        images[image_id] = AnnotatedImage(image_id, entry["file_name"], path, width, height, [])
        progress.update(f"check {split}", len(images), len(entries), {})
    return images


def _size_of_file(split: str, path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise DataError(
            split,
            f"no image {path}, which the annotations list",
            "add it or give the directory that the file names are relative to",
        )
    try:
        height, width = encoded_size(path)
    except ValueError:
        raise DataError(split, f"{path} is not an image", "replace or remove it") from None
    return width, height


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_KINDS = {"file_name": str, "name": str, "bbox": list}  # ids are integers


def _fields(split: str, section: str, number: int, entry: Any, *names: str) -> list[Any]:
    """The named fields of one entry of the JSON, checked to have COCO's types."""
    for name in names:
        kind = _KINDS.get(name, int)
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise DataError(
                split,
                f"{section}[{number}] has no {name!r} of type {kind.__name__}",
                "give a COCO instances JSON",
            )
    return [entry[name] for name in names]

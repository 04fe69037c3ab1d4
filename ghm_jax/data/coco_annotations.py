"""COCO instances files, read and checked against their images: one line for what does not fit."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ghm_jax.config import ConfigError


class AnnotatedImage(NamedTuple):
    """One image file and what the annotations say about it."""

    id: int
    file_name: str
    path: Path
    width: int
    height: int
    annotations: list[dict[str, Any]]
    """With the keys id, category_id, bbox (x, y, width, height in pixels), area, iscrowd."""


def read_split(
    split: str, directory: Path, annotations: Path
) -> tuple[dict[int, str], list[AnnotatedImage]]:
    """Reads one split.

    Args:
        split: its name, for messages.
        directory: what the file names of the images are relative to.
        annotations: COCO instances JSON.

    Returns:
        {category id: name} in the order of ids, which is the order of labels; and the images.

    Raises:
        ConfigError: a missing file, or annotations that are not COCO's or do not fit the images.
    """
    source = _read_json(split, annotations)
    categories = _read_categories(split, source)
    images = _read_images(split, directory, source)
    for number, entry in enumerate(source["annotations"]):
        _, image_id, category_id, bbox = _fields(
            split, "annotations", number, entry, "id", "image_id", "category_id", "bbox"
        )
        if image_id not in images or category_id not in categories:
            raise ConfigError(
                f"{split}: annotations[{number}] is of image {image_id} and category "
                f"{category_id}, which the file does not list; add or remove them"
            )
        if len(bbox) != 4 or not all(map(_is_number, bbox)) or min(bbox[2:]) < 0:
            raise ConfigError(
                f"{split}: annotations[{number}] has the bbox {bbox}; "
                "it must be x, y, width, height in pixels"
            )
        area = entry.get("area")
        images[image_id].annotations.append(
            {
                "id": entry["id"],
                "category_id": category_id,
                "bbox": bbox,
                "area": area if _is_number(area) else bbox[2] * bbox[3],
                "iscrowd": bool(entry.get("iscrowd", 0)),
            }
        )
    return categories, list(images.values())


def _read_json(split: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{split}: no annotation file {path}; give a COCO instances JSON")
    try:
        source = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{split}: {path} is not JSON ({error}); give a COCO instances JSON"
        ) from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(source, dict) or not isinstance(source.get(key), list):
            raise ConfigError(
                f"{split}: {path} has no list {key!r}; give a COCO instances JSON, "
                "with images, annotations and categories"
            )
    return source


def _read_categories(split: str, source: dict[str, Any]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(source["categories"]):
        category_id, name = _fields(split, "categories", number, entry, "id", "name")
        if category_id in categories or name in categories.values():
            raise ConfigError(
                f"{split}: two categories have the id {category_id} or the name {name!r}; "
                "give every category its own"
            )
        categories[category_id] = name
    if not categories:
        raise ConfigError(f"{split}: the annotations name no categories; add at least one")
    return dict(sorted(categories.items()))


def _read_images(split: str, directory: Path, source: dict[str, Any]) -> dict[int, AnnotatedImage]:
    images: dict[int, AnnotatedImage] = {}
    for number, entry in enumerate(source["images"]):
        image_id, file_name = _fields(split, "images", number, entry, "id", "file_name")
        if image_id in images or not 0 <= image_id < 2**31:
            raise ConfigError(
                f"{split}: the image id {image_id} occurs twice or does not fit in 32 bits; "
                "number the images anew"
            )
        path = directory / file_name
        width, height = _size_of_file(split, path)
        stated = (entry.get("width", width), entry.get("height", height))
        if stated != (width, height):
            raise ConfigError(
                f"{split}: {path} has {width}x{height} pixels, the annotations say "
                f"{stated[0]}x{stated[1]}; save the image as it was annotated (an orientation tag "
                "does not turn pixels) or correct the annotations"
            )
        images[image_id] = AnnotatedImage(image_id, file_name, path, width, height, [])
    if not images:
        raise ConfigError(f"{split}: the annotations name no images; add at least one")
    return images


def _size_of_file(split: str, path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise ConfigError(
            f"{split}: no image {path}, which the annotations name; "
            "add it or give the directory that the file names are relative to"
        )
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        raise ConfigError(f"{split}: {path} is no image; replace or remove it") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_KINDS = {"file_name": str, "name": str, "bbox": list}  # ids are integers


def _fields(split: str, part: str, number: int, entry: Any, *names: str) -> list[Any]:
    """The named fields of one entry of the JSON, with the types COCO gives them."""
    for name in names:
        kind = _KINDS.get(name, int)
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise ConfigError(
                f"{split}: {part}[{number}] has no {name!r} of the type {kind.__name__}; "
                "give a COCO instances JSON"
            )
    return [entry[name] for name in names]

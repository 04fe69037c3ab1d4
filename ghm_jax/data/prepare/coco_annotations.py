"""Splits to prepare: COCO instances files, checked against their images."""

import hashlib
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghm_jax.data.coco_fields import LIKE_CORNERS, look_like_corners, read_instances
from ghm_jax.data.transforms import encoded_size
from ghm_jax.exceptions import DataError
from ghm_jax.progress import Progress


class AnnotatedImage(NamedTuple):
    """One image file and its annotations."""

    id: int
    file_name: str
    path: Path
    width: int
    """In pixels; 0 until `check_sizes` if the annotations do not say it."""
    height: int
    annotations: list[dict[str, Any]]
    """With the keys id, category_id, bbox (x, y, width, height in pixels), area, iscrowd."""


def read_split(
    split: str, directory: Path, annotations: Path, *, subset: float = 1.0
) -> tuple[dict[int, str], list[AnnotatedImage]]:
    """Reads the annotations of one split; of its images nothing is read.

    Args:
        split: its name; if it begins with `test`, annotations are optional.
        directory: the directory that the file names of the images are relative to.
        annotations: COCO instances JSON.
        subset: fraction of the images, in (0, 1]. It depends on their ids alone, and a smaller
            subset is part of every larger one. The other images need not exist.

    Returns:
        {category id: name} in the order of ids, which is the order of labels; and the images.

    Raises:
        DataError: annotations that `read_instances` refuses.
    """
    if not annotations.is_file():
        raise DataError(split, f"no annotation file {annotations}", "give a COCO instances JSON")
    found = read_instances(annotations)
    if found.annotations is None and not split.startswith("test"):
        raise DataError(str(annotations), "has no list 'annotations'", "give a COCO instances JSON")
    for number, row in enumerate(found.images):
        if not row["file_name"]:
            problem = f"images[{number}] has no file_name"
            raise DataError(str(annotations), problem, "it must be the path of the image")
    images = {
        row["id"]: AnnotatedImage(
            row["id"],
            row["file_name"],
            directory / row["file_name"],
            row["width"],
            row["height"],
            [],
        )
        for row in _choose(found.images, subset)
    }
    for annotation in found.annotations or []:
        if annotation["image_id"] in images:
            images[annotation["image_id"]].annotations.append(annotation)
    for image in images.values():
        image.annotations.sort(key=lambda annotation: annotation["id"])  # as TFDS `coco` does
    return {row["id"]: row["name"] for row in found.categories}, list(images.values())


def _choose(images: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """At least one image, and the same ones on every machine: those whose ids hash lowest."""
    order = sorted(images, key=lambda row: hashlib.sha256(b"%d" % row["id"]).digest())
    chosen = {row["id"] for row in order[: max(1, round(share * len(order)))]}
    return [row for row in images if row["id"] in chosen]


def stamp_of(split: str, images: list[AnnotatedImage]) -> str:
    """SHA-256 of the names, sizes and modification times of image files.

    Raises:
        DataError: a file is missing.
    """
    digest = hashlib.sha256()
    for image in sorted(images, key=lambda image: image.file_name):
        try:
            found = image.path.stat()
        except OSError as error:
            raise _no_image(split, image.path, error.strerror or "") from None
        if not stat.S_ISREG(found.st_mode):
            raise _no_image(split, image.path, "not a file")
        line = f"{image.file_name}\0{found.st_size}\0{found.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _no_image(split: str, path: Path, why: str) -> DataError:
    return DataError(
        split,
        f"no image {path}, which the annotations list ({why})",
        "add it or give the directory that the file names are relative to",
    )


def check_sizes(
    split: str, images: list[AnnotatedImage], progress: Progress
) -> list[AnnotatedImage]:
    """Reads the header of every image.

    Returns:
        The images with their width and height.

    Raises:
        DataError: a file is not an image, or has another size than the annotations say.
    """
    checked: list[AnnotatedImage] = []
    for image in images:
        try:
            height, width = encoded_size(image.path)
        except ValueError as error:
            raise DataError(split, f"{image.path} {error}", "replace or remove it") from None
        stated = (image.width or width, image.height or height)
        if stated != (width, height):
            raise DataError(
                split,
                f"{image.path} has {width}x{height} pixels, but the annotations say "
                f"{stated[0]}x{stated[1]}",
                "save the image as it was annotated (orientation tags are not applied) or correct "
                "the annotations",
            )
        checked.append(image._replace(width=width, height=height))
        progress.update(f"check {split}", len(checked), len(images), {})
    return checked


def boxes_in_images(images: list[AnnotatedImage]) -> tuple[np.ndarray, np.ndarray]:
    """All boxes of checked images, f64[N, 4] as annotated, and the width and height of the image
    of each, f64[N, 2]."""
    boxes = [row["bbox"] for image in images for row in image.annotations]
    sizes = [(image.width, image.height) for image in images for _ in image.annotations]
    return np.array(boxes, np.float64).reshape(-1, 4), np.array(sizes, np.float64).reshape(-1, 2)


def box_notes(images: list[AnnotatedImage]) -> list[str]:
    """What is odd about the boxes of checked images, a line each."""
    boxes, sizes = boxes_in_images(images)
    if look_like_corners(boxes, sizes):
        return ["; ".join(LIKE_CORNERS)]
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    # In float32, as a record holds them.
    inside = (end / sizes).clip(0, 1).astype("f4") > (start / sizes).clip(0, 1).astype("f4")
    outside = (boxes[:, 2:] > 0).all(axis=1) & ~inside.all(axis=1)
    beyond = ((start < -1) | (end > sizes + 1)).any(axis=1) & ~outside
    notes = []
    if beyond.any():
        notes.append(f"{beyond.sum()} boxes reach beyond their image and are clipped to it")
    if outside.any():
        of = [image.file_name for image in images for _ in image.annotations]
        notes.append(
            f"{outside.sum()} boxes lie outside their image, the first in {of[outside.argmax()]}: "
            "nothing can find them and evaluation counts them as missed; correct or remove them"
        )
    return notes

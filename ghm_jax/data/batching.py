"""From a record to arrays, and from arrays of several sizes to one batch of a fixed shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ghm_jax.config import Data
from ghm_jax.data.placement import choose_placement
from ghm_jax.data.schema import has_area, read_objects, trainable
from ghm_jax.data.transforms import decode_image
from ghm_jax.exceptions import ConfigError

Example = dict[str, Any]
Batch = dict[str, np.ndarray]

PADDING = -1
"""Label of a box that only fills up a batch."""
CROWD = -2
"""Label of a crowd region, whatever its class (`ghm_jax.detection.matching.CROWD`)."""


def make_example(
    record: Mapping[str, Any],
    data: Data,
    rng: np.random.Generator | None,
    *,
    keep_crowd: bool = False,
) -> Example:
    """One image with its boxes, placed.

    Degenerate boxes are left out (see `schema.trainable`); ground truth for evaluation comes from
    `ground_truth.coco_ground_truth`, which keeps them.

    Args:
        record: of a `Dataset`.
        data: sizes and probabilities.
        rng: of this one image, for augmentation; None: none.
        keep_crowd: keep crowd regions, with the label CROWD, instead of leaving them out.

    Returns:
        image uint8[h, w, 3], boxes f32[N, 4] (x0, y0, x1, y1 in pixels of `image`), labels i32[N],
        image_size and original_size (height, width), scale and offset (see `Placement`), image_id,
        valid, replaced.

    Raises:
        ConfigError: the image cannot be decoded.
    """
    try:
        image = decode_image(record["image"])
    except ValueError as error:
        raise unreadable(record, error) from None
    original_size = image.shape[:2]
    objects = read_objects(record, *original_size)
    keep = trainable(objects, keep_crowd=keep_crowd)
    labels = np.where(objects.is_crowd, CROWD, objects.labels).astype(np.int32)[keep]
    placement = choose_placement(original_size, data, rng)
    boxes = placement.place_boxes(objects.boxes[keep])
    if placement.size != placement.scaled:
        inside = has_area(boxes)
        boxes, labels = boxes[inside], labels[inside]
    return {
        "image": placement.place_image(image),
        "boxes": boxes,
        "labels": labels,
        "image_size": placement.size,
        "original_size": original_size,
        "scale": placement.scale,
        "offset": placement.offset,
        "image_id": int(record["image/id"]),
        "valid": True,
        "replaced": False,
    }


def unreadable(record: Mapping[str, Any], reason: ValueError) -> ConfigError:
    """What to raise for an image that cannot be decoded."""
    name = bytes(record.get("image/filename", b"")).decode()
    return ConfigError(
        f"data.name: image {record['image/id']} ({name}): {reason}; replace it, or train without "
        "such images by --data.on-error skip"
    )


def filler_example() -> Example:
    """What fills the last batch of an evaluation: one black pixel that does not count."""
    return {
        "image": np.zeros((1, 1, 3), np.uint8),
        "boxes": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int32),
        "image_size": (1, 1),
        "original_size": (1, 1),
        "scale": (1.0, 1.0),
        "offset": (0.0, 0.0),
        "image_id": -1,
        "valid": False,
        "replaced": False,
    }


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first (height, width) of `buckets` that holds an image of this (height, width).

    Raises:
        ConfigError: none does.
    """
    for bucket in buckets:
        if size[0] <= bucket[0] and size[1] <= bucket[1]:
            return bucket
    raise ConfigError(
        f"data.buckets: an image needs {size[0]}x{size[1]} pixels (height x width), more than "
        f"any of {tuple(buckets)} has; add a larger one"
    )


def collate(examples: Sequence[Example], bucket: tuple[int, int], max_boxes: int) -> Batch:
    """Pads B examples to the (height, width) of one bucket, which must hold them.

    Images are padded with zeros at the bottom and the right, so that box coordinates stay. Of more
    than `max_boxes` boxes the largest are kept, and crowd regions go first.

    Returns:
        images uint8[B, H, W, 3], boxes f32[B, max_boxes, 4] (x0, y0, x1, y1 in pixels of the padded
        image; 0 = padding), labels i32[B, max_boxes] (a class, PADDING or CROWD), image_size and
        original_size i32[B, 2] (height, width), scale and offset f32[B, 2] (x, y; see
        `placement.to_original`), image_id i32[B] (-1 = filler), valid bool[B], dropped_boxes
        i32[B], replaced bool[B] (stands in for an image that cannot be decoded).
    """
    size = len(examples)
    images = np.zeros((size, *bucket, 3), np.uint8)
    boxes = np.zeros((size, max_boxes, 4), np.float32)
    labels = np.full((size, max_boxes), PADDING, np.int32)
    dropped = np.zeros(size, np.int32)
    for i, example in enumerate(examples):
        h, w = example["image_size"]
        images[i, :h, :w] = example["image"]
        kept = _most_important(example["boxes"], example["labels"], max_boxes)
        boxes[i, : len(kept)] = example["boxes"][kept]
        labels[i, : len(kept)] = example["labels"][kept]
        dropped[i] = len(example["boxes"]) - len(kept)
    return {
        "images": images,
        "boxes": boxes,
        "labels": labels,
        "image_size": np.array([e["image_size"] for e in examples], np.int32),
        "original_size": np.array([e["original_size"] for e in examples], np.int32),
        "scale": np.array([e["scale"] for e in examples], np.float32),
        "offset": np.array([e["offset"] for e in examples], np.float32),
        "image_id": np.array([e["image_id"] for e in examples], np.int32),
        "valid": np.array([e["valid"] for e in examples], bool),
        "dropped_boxes": dropped,
        "replaced": np.array([e["replaced"] for e in examples], bool),
    }


def _most_important(boxes: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` boxes, in their order: of objects before crowds, then the largest."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.sort(np.lexsort((-areas, labels == CROWD))[:count])

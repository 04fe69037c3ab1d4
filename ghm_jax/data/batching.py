"""From a record to arrays, and from arrays of several sizes to one batch of fixed shape."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ghm_jax.batch import NO_CLASS, Batch, GroundTruth, LoadedBatch
from ghm_jax.config import Data
from ghm_jax.data.placement import choose_placement
from ghm_jax.data.schema import has_area, read_objects, trainable
from ghm_jax.data.transforms import decode_image
from ghm_jax.exceptions import ConfigError, DataError


class Example(NamedTuple):
    """One image with its boxes, scaled and augmented."""

    image: np.ndarray
    """uint8[h, w, 3], RGB, as it goes into a batch."""
    boxes: np.ndarray = np.zeros((0, 4), np.float32)
    """f32[N, 4], x0, y0, x1, y1 in pixels of `image`."""
    labels: np.ndarray = np.zeros(0, np.int32)
    """i32[N], class indices; NO_CLASS for crowd regions."""
    is_crowd: np.ndarray = np.zeros(0, bool)
    """bool[N]"""
    scale: tuple[float, float] = (1.0, 1.0)
    """See `Placement`."""
    offset: tuple[float, float] = (0.0, 0.0)
    """See `Placement`."""
    image_id: int = -1
    valid: bool = False
    """False: filler of an incomplete batch."""
    replaced: bool = False
    """Replaces an image that cannot be decoded."""


def make_example(
    record: Mapping[str, Any],
    data: Data,
    rng: np.random.Generator | None,
    *,
    keep_crowd: bool = False,
) -> Example:
    """Decodes, scales and augments one image with its boxes.

    Degenerate boxes are dropped (see `schema.trainable`); ground truth for evaluation comes from
    `ground_truth.coco_ground_truth`, which keeps them.

    Args:
        record: of a `Dataset`.
        data: sizes and probabilities.
        rng: of this image alone, for augmentation; None: no augmentation.
        keep_crowd: keep crowd regions instead of dropping them.

    Raises:
        DataError: the image cannot be decoded.
    """
    try:
        image = decode_image(record["image"])
    except ValueError as error:
        raise unreadable(record, error) from None
    stored_size = image.shape[:2]
    objects = read_objects(record)
    keep = trainable(objects, keep_crowd=keep_crowd)
    placement = choose_placement(stored_size, data, rng)
    boxes = placement.place_boxes(objects.boxes_in_pixels(*stored_size)[keep])
    is_crowd = objects.is_crowd[keep]
    labels = np.where(is_crowd, NO_CLASS, objects.labels[keep]).astype(np.int32)
    inside = has_area(boxes)  # some are cropped away, or too thin for float32 pixels
    boxes, labels, is_crowd = boxes[inside], labels[inside], is_crowd[inside]
    return Example(
        image=placement.place_image(image),
        boxes=boxes,
        labels=labels,
        is_crowd=is_crowd,
        scale=placement.scale,
        offset=placement.offset,
        image_id=int(record["image/id"]),
        valid=True,
    )


def unreadable(record: Mapping[str, Any], reason: ValueError) -> DataError:
    """The error for an image that cannot be decoded."""
    name = bytes(record.get("image/filename", b"")).decode()
    return DataError(
        "data.name",
        f"image {record['image/id']} ({name}): {reason}",
        "replace it, or set `data.on_error` skip to train without such images",
    )


def filler_example() -> Example:
    """Fills the last batch of an evaluation: one black pixel, which is not `valid`."""
    return Example(np.zeros((1, 1, 3), np.uint8))


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first (height, width) of `buckets` that fits an image of this (height, width).

    Raises:
        ConfigError: none fits it.
    """
    for bucket in buckets:
        if size[0] <= bucket[0] and size[1] <= bucket[1]:
            return bucket
    raise ConfigError(
        "data.buckets",
        f"an image needs {size[0]}x{size[1]} pixels (height x width) and fits in none of "
        f"{tuple(buckets)}",
        "add a larger one",
    )


def collate(examples: Sequence[Example], bucket: tuple[int, int], max_boxes: int) -> LoadedBatch:
    """Pads B examples to the (height, width) of one bucket, which must fit them.

    Images are padded with zeros at the bottom and the right, so that box coordinates stay the same.
    Of more than `max_boxes` boxes the largest are kept; crowd regions are dropped first.
    """
    size = len(examples)
    images = np.zeros((size, *bucket, 3), np.uint8)
    boxes = np.zeros((size, max_boxes, 4), np.float32)
    labels = np.full((size, max_boxes), NO_CLASS, np.int32)
    is_crowd = np.zeros((size, max_boxes), bool)
    dropped = np.zeros(size, np.int32)
    for i, example in enumerate(examples):
        height, width = example.image.shape[:2]
        images[i, :height, :width] = example.image
        kept = _most_important(example.boxes, example.is_crowd, max_boxes)
        boxes[i, : len(kept)] = example.boxes[kept]
        labels[i, : len(kept)] = example.labels[kept]
        is_crowd[i, : len(kept)] = example.is_crowd[kept]
        dropped[i] = len(example.boxes) - len(kept)
    batch = Batch(
        images=images,
        image_size=np.array([e.image.shape[:2] for e in examples], np.int32),
        image_id=np.array([e.image_id for e in examples], np.int32),
        truth=GroundTruth(boxes, labels, is_crowd),
    )
    return LoadedBatch(
        batch=batch,
        scale=np.array([e.scale for e in examples], np.float32),
        offset=np.array([e.offset for e in examples], np.float32),
        valid=np.array([e.valid for e in examples], bool),
        dropped_boxes=dropped,
        replaced=np.array([e.replaced for e in examples], bool),
    )


def _most_important(boxes: np.ndarray, is_crowd: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` boxes, ascending: objects are kept before crowds, large before small."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.sort(np.lexsort((-areas, is_crowd))[:count])

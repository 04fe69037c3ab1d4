"""Which images a step sees: a function of (seed, step), computed and not iterated.

The images of a step must share one bucket, so the images of a data set are sorted into groups by
the first bucket that fits them: landscape and portrait, in most data sets. Each group is reshuffled
every epoch, and each step takes its images from one group. The groups take turns in proportion to
their sizes, so that after any number of steps all images have been seen about equally often. There
are as many compiled programs as groups, and no image is padded because of others in its batch.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from ghm_jax.config import Data
from ghm_jax.data.batching import choose_bucket
from ghm_jax.data.transforms import resized_size

Bucket = tuple[int, int]
"""(height, width)"""
Groups = Mapping[Bucket, np.ndarray]
"""{bucket: i64[n], indices of its images in the data set, ascending}"""


_ENDLESS = 2**52
"""Images. Grain gives endless orders a length as well, which overflows for batches of 1."""


class Draw(NamedTuple):
    """The images of one step."""

    bucket: Bucket
    images: tuple[int, ...]
    """Indices in the data set."""


def group_images(sizes: np.ndarray, images: np.ndarray, data: Data) -> Groups:
    """Sorts images by the first bucket that fits them, in the order of `data.buckets`.

    Augmentation never makes an image larger than it is without, so its group never changes.

    Args:
        sizes: i32[N, 2], (height, width) of the images of a data set.
        images: i64[n], indices of those to sort.
        data: sides and buckets.

    Raises:
        ConfigError: an image fits in no bucket.
    """

    @functools.cache
    def bucket_of(height: int, width: int) -> Bucket:
        size = resized_size(height, width, data.short_side, data.long_side)
        return choose_bucket(size, data.buckets)

    buckets = [bucket_of(*size) for size in sizes[images].tolist()]
    chosen = np.array([data.buckets.index(bucket) for bucket in buckets], int)
    groups = {b: images[chosen == i] for i, b in enumerate(data.buckets)}
    return {bucket: group for bucket, group in groups.items() if len(group)}


def training_order(groups: Groups, seed: int, batch_size: int) -> grain.MapDataset:
    """The `Draw` of every step, without end; a batch may span the end of an epoch."""
    orders = [
        grain.MapDataset.range(len(group))
        .seed(seed)
        .shuffle()
        .repeat(_ENDLESS // len(group))
        .batch(batch_size, batch_fn=functools.partial(_draw, bucket, group))
        for bucket, group in groups.items()
    ]
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [len(group) for group in groups.values()]).seed(seed)


def reading_order(groups: Groups, batch_size: int) -> grain.MapDataset:
    """The `Draw`s that cover every image once; the last one of a group may be smaller."""
    draws = [
        _draw(bucket, group, range(start, min(start + batch_size, len(group))))
        for bucket, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]
    return grain.MapDataset.source(draws)


def _draw(bucket: Bucket, group: np.ndarray, positions: Sequence[int]) -> Draw:
    return Draw(bucket, tuple(group[list(positions)].tolist()))

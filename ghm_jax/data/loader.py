"""Batches in an order that is a function of (seed, step), however many processes read them.

What a step sees is computed, not iterated: a run resumed at step s starts reading at step s, also
on a different number of workers or hosts, without any input state to restore.
"""

import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from ghm_jax.batch import LoadedBatch
from ghm_jax.config import Config, Data
from ghm_jax.data.batching import (
    Example,
    collate,
    filler_example,
    make_example,
    unreadable,
)
from ghm_jax.data.dataset import Dataset
from ghm_jax.data.order import Draw, Groups, group_images, reading_order, training_order
from ghm_jax.data.workers import check_workers
from ghm_jax.exceptions import ConfigError, DataError

Batches = Generator[LoadedBatch, None, None]
"""An iterator of batches; its `close()` stops the threads and processes that prefetch."""


@dataclass(frozen=True)
class _Share:
    """The part of every global batch that one host reads."""

    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self):
        if self.batch_size % self.process_count:
            raise ValueError(
                f"{self.batch_size} images cannot be split over {self.process_count} processes"
            )

    @property
    def size(self) -> int:
        return self.batch_size // self.process_count

    @property
    def slots(self) -> slice:
        return slice(self.process_index * self.size, (self.process_index + 1) * self.size)


def train_batches(
    dataset: Dataset,
    config: Config,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    groups: Groups | None = None,
) -> Batches:
    """Batches of the steps `start_step`, `start_step` + 1, ... without end.

    All images of a batch share one bucket; the order is random, see `ghm_jax.data.order`.

    Args:
        dataset: to read.
        config: seed, data, optimizer.batch_size (images per step, over all hosts) and run.workers
            are used.
        start_step: first step.
        process_index: index of this host, ...
        process_count: ... out of this many; each gets its contiguous share of the global batch.
        groups: the result of `training_groups`, if it is known already.

    Returns:
        See `batching.collate`; all hosts get images of the same height and width.

    Raises:
        ConfigError, DataError: see `training_groups`.
        ConfigError: the workers cannot run on this machine.
        DataError: while reading, if an image cannot be decoded (see `data.on_error`).
    """
    size = config.optimizer.batch_size
    share = _Share(size, process_index, process_count)
    check_workers(config.data, share.size, config.run.workers)
    groups = groups or training_groups(dataset, config.data)
    build = functools.partial(
        _train_batch, dataset=dataset, groups=groups, config=config, share=share
    )
    steps = training_order(groups, config.seed, size).random_map(build)
    return _read(steps[start_step:], config.run.workers)


def validation_batches(
    dataset: Dataset, config: Config, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Every image once over all hosts together, one bucket after the other.

    The last batch of a bucket is filled up with images that are not `valid`. Arguments and batches
    are those of `train_batches`, but with predict.batch_size.

    Raises:
        ConfigError: an image fits in no bucket, or the workers cannot run on this machine.
        DataError: the header of an image cannot be read; while reading: an image cannot be decoded.
    """
    size = config.predict.batch_size
    share = _Share(size, process_index, process_count)
    check_workers(config.data, share.size, config.run.workers)
    build = functools.partial(_validation_batch, dataset=dataset, data=config.data, share=share)
    _check_headers(dataset)
    groups = group_images(dataset.index.sizes, np.arange(len(dataset)), config.data)
    return _read(reading_order(groups, size).map(build), config.run.workers)


def training_groups(dataset: Dataset, data: Data) -> Groups:
    """The images of a data set that are trained on, by bucket.

    Raises:
        ConfigError: an image fits in no bucket, or no image has an object to learn from.
        DataError: the header of an image cannot be read, unless data.on_error is `skip`.
    """
    sizes, objects = dataset.index.sizes, dataset.index.objects
    if data.on_error == "error":
        _check_headers(dataset)
    readable = sizes[:, 0] > 0
    images = np.flatnonzero(readable & (data.keep_empty | (objects > 0)))
    if not len(images):
        raise ConfigError(
            "data.train_split",
            f"no image of {dataset.name} has an object to learn from",
            "annotate some or choose another split",
        )
    return group_images(sizes, images, data)


def _check_headers(dataset: Dataset) -> None:
    readable = dataset.index.sizes[:, 0] > 0
    if not readable.all():
        record = dataset.source[int(np.argmin(readable))]
        raise unreadable(record, ValueError("cannot read its header"))


def _train_batch(
    draw: Draw,
    rng: np.random.Generator,
    *,
    dataset: Dataset,
    groups: Groups,
    config: Config,
    share: _Share,
) -> LoadedBatch | DataError:
    # One seed per image of the global batch: the same whichever host loads the image.
    seeds = rng.integers(2**63, size=len(draw.images))
    try:
        examples = [
            _train_example(image, seed, groups[draw.bucket], dataset, config)
            for image, seed in zip(draw.images[share.slots], seeds[share.slots], strict=True)
        ]
    except DataError as error:
        return error  # `_read` raises it: Grain would turn it into text
    return collate(examples, draw.bucket, config.data.max_boxes)


def _train_example(
    image: int, seed: int, group: np.ndarray, dataset: Dataset, config: Config
) -> Example:
    """An augmented image. If it cannot be decoded and data.on_error is `skip`, another one of its
    group replaces it, which depends on the seed."""
    data, keep_crowd = config.data, config.anchors.crowd == "ignore"
    attempts = 10 if data.on_error == "skip" else 1
    for attempt in range(attempts):
        rng = np.random.default_rng(seed)
        try:
            example = make_example(dataset.source[image], data, rng, keep_crowd=keep_crowd)
        except DataError:
            if attempt + 1 == attempts:
                raise
            image = int(np.random.default_rng((seed, attempt)).choice(group))
        else:
            return example._replace(replaced=attempt > 0)
    raise AssertionError("not reached")


def _validation_batch(
    draw: Draw, *, dataset: Dataset, data: Data, share: _Share
) -> LoadedBatch | DataError:
    try:
        examples = [make_example(dataset.source[i], data, None) for i in draw.images[share.slots]]
    except DataError as error:
        return error
    examples += [filler_example()] * (share.size - len(examples))
    return collate(examples, draw.bucket, data.max_boxes)


def _read(batches: grain.MapDataset, workers: int) -> Batches:
    """Prefetches, in this process or in workers; the order is that of `batches`."""
    iterable = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        # Grain reads an absl flag, which raises in a program that absl did not start.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        iterable = iterable.mp_prefetch(options)
    iterator = iter(iterable)
    try:
        for batch in iterator:
            if isinstance(batch, DataError):
                raise batch
            # Copied out of the workers' shared memory, which warns if it outlives the interpreter.
            yield _copy(batch) if workers else batch
    finally:
        iterator.close()


def _copy(tree: Any) -> Any:
    """A copy of all arrays, in the same named tuples."""
    if isinstance(tree, tuple):
        return type(tree)(*map(_copy, tree))
    return np.array(tree)

"""Batches in an order that is a function of (seed, step), whatever reads them.

What a step sees is computed, not iterated: a run resumed at step s starts reading at step s, on
another number of workers or hosts if need be, without any state of the input to restore.
"""

import functools
from collections.abc import Generator
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from ghm_jax.config import Config, Data
from ghm_jax.data.batching import Batch, collate, filler_example, make_example
from ghm_jax.data.dataset import Dataset
from ghm_jax.data.order import Draw, Groups, group_images, reading_order, training_order

Batches = Generator[Batch, None, None]
"""An iterator of batches; its `close()` stops the threads and processes that read ahead."""


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
) -> Batches:
    """Batches of the steps `start_step`, `start_step` + 1, ... without end.

    The images of a batch have one orientation, those of the whole data set in random order; see
    `ghm_jax.data.order`.

    Args:
        dataset: to read.
        config: uses seed, data, optimizer.batch_size (images a step, over all hosts), run.workers.
        start_step: first step.
        process_index: this host, ...
        process_count: ... of this many; each gets its contiguous share of the global batch.

    Returns:
        See `batching.collate`; all hosts get images of the same height and width.

    Raises:
        ConfigError: an image fits in no bucket.
    """
    size = config.optimizer.batch_size
    share = _Share(size, process_index, process_count)
    build = functools.partial(_train_batch, dataset=dataset, config=config, share=share)
    groups = _groups(dataset, config.data)
    steps = training_order(groups, config.seed, size).random_map(build)
    return _read(steps[start_step:], config.run.workers)


def validation_batches(
    dataset: Dataset, config: Config, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Every image once over all hosts together, one bucket after the other.

    The last batch of a bucket is filled up with images that are not `valid`. Arguments and batches
    as of `train_batches`, with predict.batch_size.
    """
    size = config.predict.batch_size
    share = _Share(size, process_index, process_count)
    build = functools.partial(_validation_batch, dataset=dataset, data=config.data, share=share)
    order = reading_order(_groups(dataset, config.data), size)
    return _read(order.map(build), config.run.workers)


def _groups(dataset: Dataset, data: Data) -> Groups:
    images = np.arange(len(dataset))
    if len(data.buckets) == 1:
        return {data.buckets[0]: images}
    return group_images(dataset.index.sizes, images, data)


def _train_batch(
    draw: Draw,
    rng: np.random.Generator,
    *,
    dataset: Dataset,
    config: Config,
    share: _Share,
) -> Batch:
    data, keep_crowd = config.data, config.anchors.crowd == "ignore"
    # One seed for each image of the global batch: the same whichever host builds the image.
    seeds = rng.integers(2**63, size=len(draw.images))
    examples = [
        make_example(dataset.source[i], data, np.random.default_rng(seed), keep_crowd=keep_crowd)
        for i, seed in zip(draw.images[share.slots], seeds[share.slots], strict=True)
    ]
    return collate(examples, draw.bucket, data.max_boxes)


def _validation_batch(draw: Draw, *, dataset: Dataset, data: Data, share: _Share) -> Batch:
    examples = [make_example(dataset.source[i], data, None) for i in draw.images[share.slots]]
    examples += [filler_example()] * (share.size - len(examples))
    return collate(examples, draw.bucket, data.max_boxes)


def _read(batches: grain.MapDataset, workers: int) -> Batches:
    """Reads ahead, in this process or in others; the order is that of `batches`."""
    iterable = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        # Grain asks absl for a flag, which raises in a program that absl did not start.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        iterable = iterable.mp_prefetch(options)
    iterator = iter(iterable)
    try:
        for batch in iterator:
            # Out of the workers' shared memory, which complains if it outlives the interpreter.
            yield {key: np.array(value) for key, value in batch.items()} if workers else batch
    finally:
        iterator.close()

"""Compiling the training step before the first batch comes."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ghm_jax.config import Config
from ghm_jax.data.batching import collate, filler_example
from ghm_jax.data.order import Bucket
from ghm_jax.distributed.devices import split_batch
from ghm_jax.progress import Progress
from ghm_jax.training.state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
"""The training step on all devices, of a split batch."""


def compile_step(
    step: Step,
    state: TrainState,
    config: Config,
    buckets: tuple[Bucket, ...],
    replicas: int,
    progress: Progress,
) -> None:
    """Compiles the step for each bucket, by running it once on images that are all padding.

    Training then never stops to compile, and running out of memory shows now. The step may reuse
    the memory of the state that it is given: it gets a copy.
    """
    size = config.optimizer.batch_size // jax.process_count()
    for number, bucket in enumerate(buckets, 1):
        progress.say(
            f"compiling the training step for images of {bucket[0]}x{bucket[1]} pixels"
            f"{f' ({number} of {len(buckets)})' * (len(buckets) > 1)}, about half a minute"
        )
        start = time.perf_counter()
        padding = collate([filler_example()] * size, bucket, config.data.max_boxes).batch
        copy = jax.tree.map(jnp.copy, state)
        jax.block_until_ready(step(copy, split_batch(padding, replicas)))
        progress.say(f"... compiled in {time.perf_counter() - start:.0f} s")

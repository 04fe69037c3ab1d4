"""Static shapes: however the images differ, the step is compiled once for each bucket."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from tiny import Listener, tiny_config

from ghm_jax.data import open_dataset, train_batches
from ghm_jax.distributed.devices import (
    ProgramCount,
    choose_devices,
    parallelize,
    replicate,
    split_batch,
)
from ghm_jax.training.compilation import compile_step

BUCKETS = ((64, 96), (96, 64))


def add_up(state, batch):
    """A cheap step that reads all of its batch."""
    return state + sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(batch))


@pytest.fixture
def batches(dataset_dir):
    data = dataclasses.replace(
        tiny_config(dataset_dir).data, long_side=96, buckets=BUCKETS, min_short_side=40
    )
    config = tiny_config(dataset_dir, data=data)
    stream = train_batches(open_dataset(data, "train"), config, 0)
    yield (loaded.batch for loaded in stream)
    stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["pmap", "shard_map"])
def test_a_thousand_mixed_steps_compile_one_program_for_each_bucket(batches, wrapper):
    messages = []
    counted = ProgramCount(add_up, len(BUCKETS), messages.append)
    step = parallelize(counted, choose_devices(2), wrapper)
    state, shapes, boxes = replicate(jnp.zeros(()), choose_devices(2)), set(), set()
    for batch in itertools.islice(batches, 1000):
        shapes.add(batch.images.shape)
        boxes.add(int((batch.truth.labels >= 0).sum()))
        state = step(state, split_batch(batch, 2))
    assert len(shapes) == 2
    assert len(boxes) > 3, "batches with different numbers of boxes must be tried"
    assert counted.count == 2
    assert messages == []


def test_an_unexpected_shape_gives_a_warning_with_the_shape(batches):
    messages = []
    step = parallelize(ProgramCount(add_up, 1, messages.append), choose_devices(2))
    batch = next(batches)
    state = replicate(jnp.zeros(()), choose_devices(2))
    state = step(state, split_batch(batch, 2))
    assert messages == []
    step(state, split_batch(jax.tree.map(lambda x: x[:2], batch), 2))
    (line,) = messages
    assert "warning: compiling program 2 of the step, expected 1" in line
    assert f"(batch: images {[1, *batch.images.shape[1:]]}, image_size [1, 2], " in line
    assert "truth.labels [1, 4]" in line


@pytest.mark.parametrize("wrapper", ["pmap", "shard_map"])
def test_every_program_is_compiled_before_the_first_step(batches, dataset_dir, wrapper):
    data = dataclasses.replace(tiny_config(dataset_dir).data, long_side=96, buckets=BUCKETS)
    listener, devices = Listener(), choose_devices(2)
    counted = ProgramCount(add_up, len(BUCKETS), listener.say)
    step = parallelize(counted, devices, wrapper, donate=True)
    state = replicate(jnp.zeros(()), devices)
    compile_step(step, state, tiny_config(dataset_dir, data=data), BUCKETS, 2, listener)
    assert counted.count == 2
    assert state == 0
    assert [line.split(",")[0] for line in listener.lines[::2]] == [
        "compiling the training step for images of 64x96 pixels (1 of 2)",
        "compiling the training step for images of 96x64 pixels (2 of 2)",
    ]
    shapes = set()
    for batch in itertools.islice(batches, 30):
        shapes.add(batch.images.shape)
        state = step(state, split_batch(batch, 2))
    assert len(shapes) == counted.count == 2

"""A GHM loss is that of the whole batch, however the batch is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghm_jax.distributed.devices import REPLICA, choose_devices, parallelize, split_batch
from ghm_jax.losses import ghm_c_loss, ghm_r_loss, init_ghm_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOSSES = {"c": ghm_c_loss, "r": ghm_r_loss}
BINS = {"c": 30, "r": 10}


def draw(rng, kind: str) -> dict[str, jax.Array]:
    """Eight shares of very different difficulty, one of them fully masked."""
    hardness = np.linspace(0.1, 4, 8).reshape(8, 1, 1)
    values = rng.normal(0, 1, (8, 30, 4)) * hardness * (1 if kind == "c" else 0.05)
    targets = rng.uniform(size=(8, 30, 4)) < 0.1 if kind == "c" else np.zeros((8, 30, 4))
    mask = rng.uniform(size=(8, 30, 4)) < 0.8
    mask[3] = False
    return {
        "values": jnp.asarray(values, jnp.float32),
        "targets": jnp.asarray(targets, jnp.float32),
        "mask": jnp.asarray(mask),
    }


def gradient_step(kind: str, dtype, axis_name: str | None):
    """(state, batch) -> loss, gradient by a shared shift of all values, state and statistics."""

    def step(state, batch):
        def total(shift):
            # The shift is shared, as weights are: its gradient needs all shares of the batch.
            values = (batch["values"] + shift[None, None]).astype(dtype)
            loss, new, stats = LOSSES[kind](
                values, batch["targets"], batch["mask"], state, axis_name=axis_name
            )
            return loss, (new, stats)

        (loss, rest), gradient = jax.value_and_grad(total, has_aux=True)(jnp.zeros(4))
        if axis_name is not None:
            loss, gradient = jax.lax.psum((loss, gradient), axis_name)
        return loss, gradient, rest

    return step


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrapper", ["pmap", "shard_map"])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_gradient_and_state_are_the_same_on_any_number_of_devices(rng, kind, wrapper, dtype):
    batch, state = draw(rng, kind), init_ghm_state(BINS[kind])
    want = jax.jit(gradient_step(kind, dtype, None))(state, batch)
    assert want[0] > 0
    for devices in (2, 8) if wrapper == "pmap" else (4,):
        step = parallelize(gradient_step(kind, dtype, REPLICA), choose_devices(devices), wrapper)
        got = step(state, split_batch(batch, devices))
        # A gradient that float32 rounds otherwise may fall on the other side in bfloat16.
        close = 1e-5 if dtype == jnp.float32 else 2e-3
        np.testing.assert_allclose(got[1], want[1], rtol=close, atol=1e-6)
        assert_same((got[0], got[2]), (want[0], want[2]))


@pytest.mark.parametrize("kind", LOSSES)
def test_accumulated_microbatches_equal_the_whole_batch(rng, kind):
    batch, state = draw(rng, kind), init_ghm_state(BINS[kind])
    loss = LOSSES[kind]
    want, slope = jax.value_and_grad(lambda x: loss(x, *list(batch.values())[1:], state)[0])(
        batch["values"]
    )
    _, want_state, want_stats = loss(*batch.values(), state)

    # First pass: the histogram of the whole batch. Second pass: losses to add.
    microbatches = [[array[i] for array in batch.values()] for i in range(8)]
    counts = jnp.asarray(sum(loss(*each, state)[2].counts for each in microbatches))
    of_batch = functools.partial(loss, state=state, batch_counts=counts)
    results = [of_batch(*each) for each in microbatches]
    gradients = [
        jax.grad(lambda x, rest=rest: of_batch(x, *rest)[0])(x) for x, *rest in microbatches
    ]

    np.testing.assert_allclose(sum(result[0] for result in results), want, rtol=1e-5)
    np.testing.assert_allclose(gradients, slope, rtol=1e-5, atol=1e-9)
    for _, new, stats in results:
        assert_same(new, want_state)
        np.testing.assert_allclose(stats.weights, want_stats.weights, rtol=1e-6)
    plain = sum(result[2].plain_loss for result in results)
    np.testing.assert_allclose(plain, want_stats.plain_loss, rtol=1e-5)

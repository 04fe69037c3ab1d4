"""A toy step on eight devices must be the step on one."""

import functools
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghm_jax.distributed.devices import (
    REPLICA,
    choose_devices,
    keep_programs,
    merge_batch,
    parallelize,
    split_batch,
    use_cpu_cores,
)

both_wrappers = pytest.mark.parametrize("wrapper", ["pmap", "shard_map"])


def step(state, batch, axis_name=REPLICA):
    """Least squares by gradient descent; the sum over the batch is divided by its size."""

    def loss(weights):
        error = batch["x"] @ weights - batch["y"]
        count = jnp.array(error.size, jnp.float32)
        if axis_name:
            count = jax.lax.psum(count, axis_name)
        return jnp.sum(error**2) / count

    value, gradient = jax.value_and_grad(loss)(state["weights"])
    if axis_name:
        value, gradient = jax.lax.psum((value, gradient), axis_name)
    new = {"weights": state["weights"] - 0.1 * gradient, "step": state["step"] + 1}
    return new, {"loss": value}


def draw(rng):
    batch = {"x": np.float32(rng.normal(size=(16, 3))), "y": np.float32(rng.normal(size=16))}
    state = {"weights": np.float32(rng.normal(size=3)), "step": np.int32(0)}
    return state, batch


@both_wrappers
@pytest.mark.parametrize(("devices", "donate"), [(1, False), (4, False), (8, True)])
def test_step_on_many_devices_is_the_step_on_one(rng, wrapper, devices, donate):
    state, batch = draw(rng)
    run = parallelize(step, jax.devices()[:devices], wrapper, donate=donate)
    alone = jax.jit(functools.partial(step, axis_name=None))
    want = state
    for _ in range(3):
        state, metrics = run(state, split_batch(batch, devices))
        want, want_metrics = alone(want, batch)
        assert state["weights"].shape == (3,)  # neither stacked nor per replica
        np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(state["weights"], want["weights"], rtol=1e-5)
    assert state["step"] == 3


@both_wrappers
def test_split_output_comes_back_in_the_order_of_the_batch(rng, wrapper):
    _, batch = draw(rng)

    def predict(state, batch):
        return {"double": state * batch["x"], "index": batch["y"] + jax.lax.axis_index(REPLICA)}

    run = parallelize(predict, jax.devices(), wrapper, split_output=True)
    output = run(jnp.array(2.0), split_batch(batch, 8))
    assert output["double"].shape == (8, 2, 3)
    merged = merge_batch(output)
    np.testing.assert_array_equal(merged["double"], 2 * batch["x"])
    np.testing.assert_allclose(merged["index"], batch["y"] + np.arange(16) // 2, rtol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2, 8, 16])
def test_merge_is_the_inverse_of_split(rng, replicas):
    _, batch = draw(rng)
    split = split_batch(batch, replicas)
    assert split["x"].shape == (replicas, 16 // replicas, 3)
    jax.tree.map(np.testing.assert_array_equal, merge_batch(split), batch)


def test_a_batch_that_cannot_be_split_is_refused(rng):
    with pytest.raises(ValueError, match="reshape"):
        split_batch(draw(rng)[1], 3)


def test_devices_are_chosen_by_number():
    assert choose_devices(0) == jax.devices()
    assert choose_devices(3) == jax.devices()[:3]


def test_devices_do_not_change_once_jax_runs():
    assert jax.device_count() == 8
    use_cpu_cores((7,))
    assert jax.device_count() == 8


def test_a_new_process_gets_as_many_devices_as_divide_its_batches():
    code = """
import jax, os
os.sched_getaffinity = lambda pid: set(range(4))
from ghm_jax.distributed.devices import use_cpu_cores
use_cpu_cores((12, 6))
print(jax.device_count())
"""
    unset = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    output = subprocess.check_output([sys.executable, "-c", code], env=unset, text=True)
    assert int(output) == 3


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JAX_NUM_CPU_DEVICES", "5"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=3"),
    ],
)
def test_a_number_of_devices_that_the_user_set_is_kept(monkeypatch, variable, value):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(jax.config, "update", lambda *args: pytest.fail(f"updated {args}"))
    use_cpu_cores((8,))


def test_programs_are_cached_unless_the_user_chose_a_directory(tmp_path, monkeypatch):
    chosen = {}
    monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    keep_programs(tmp_path)
    assert chosen == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    keep_programs(tmp_path)
    assert chosen == {"jax_compilation_cache_dir": str(tmp_path / platform.node())}


def test_a_job_of_several_processes_does_not_cache_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *args: pytest.fail(f"updated {args}"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    keep_programs(tmp_path)

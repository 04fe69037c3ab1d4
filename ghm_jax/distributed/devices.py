"""How a per-device step runs on all devices. The rest of the package deals with one replica only.

A step is written for one replica, with explicit collectives over `REPLICA`. The state goes in and
comes out un-stacked and replicated; batches are split along their first axis.
"""

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ghm_jax.exceptions import ConfigError

REPLICA = "replica"

Device = Any
"""A `jax.Device` (which type checkers take for a variable)."""


def parallelize(
    step: Callable[[Any, Any], Any],
    devices: list[Device],
    wrapper: Literal["pmap", "shard_map"] = "pmap",
    *,
    split_output: bool = False,
    donate: bool = False,
) -> Callable[[Any, Any], Any]:
    """Runs `step(state, batch)` on every device at once.

    Args:
        step: what one replica does; may use collectives over `REPLICA`.
        devices: one replica each.
        wrapper: `jax.pmap`, or `jax.shard_map` under `jax.jit`.
        split_output: False: the output is the same on all replicas and comes back once. This is
            not checked: whatever the step returns must have been reduced over `REPLICA`. True: it
            comes back with a leading axis of replicas.
        donate: the memory of `state` may be re-used for the output.

    Returns:
        A function of a state, which must hold an array (with an empty tree, `jax.pmap` of JAX 0.10
        does not split the batch), and a batch as `split_batch` returns it, [replicas, b, ...],
        where each process passes and receives the replicas on its own devices.
    """
    donated = (0,) if donate else ()
    if wrapper == "pmap":
        return jax.pmap(
            step,
            REPLICA,
            in_axes=(None, 0),
            out_axes=0 if split_output else None,
            donate_argnums=donated,
            devices=devices,
        )
    spec = jax.sharding.PartitionSpec

    def body(state: Any, batch: Any) -> Any:
        output = step(state, jax.tree.map(lambda x: x[0], batch))
        return jax.tree.map(lambda x: x[None], output) if split_output else output

    # check_vma=False: with True, JAX itself sums gradients of replicated values over the replicas,
    # and the psum in the step would make them too large without any error.
    mesh = jax.sharding.Mesh(np.asarray(devices), (REPLICA,))
    sharded = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(spec(), spec(REPLICA)),
        out_specs=spec(REPLICA) if split_output else spec(),
        check_vma=False,
    )
    compiled = jax.jit(sharded, donate_argnums=donated)
    if jax.process_count() == 1:
        return compiled
    split = jax.sharding.NamedSharding(mesh, spec(REPLICA))

    def on_all_processes(state: Any, batch: Any) -> Any:
        place = functools.partial(jax.make_array_from_process_local_data, split)
        return compiled(state, jax.tree.map(place, batch))

    return on_all_processes


def replicate(tree: Any, devices: list[Device]) -> Any:
    """The same arrays on every device, as a state that both wrappers take without a copy.

    Each of several processes passes the same arrays, its own or those of a step.
    """
    mesh = jax.sharding.Mesh(np.asarray(devices), (REPLICA,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == everywhere:
            return x
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])

    return jax.tree.map(place, tree)


def own_devices(devices: list[Device]) -> list[Device]:
    """Those of the devices that belong to this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def num_local(devices: list[Device]) -> int:
    """How many of the devices belong to this process."""
    return len(own_devices(devices))


def jit_init(function: Callable[..., Any], device: Device) -> Callable[..., Any]:
    """`jax.jit` for a function that runs once, without optimization on CPU, whose compiler is slow
    on random initializers."""
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    return jax.jit(function, compiler_options=options)


class ProgramCount:
    """A step that counts the programs it is compiled to, and warns about too many.

    JAX runs the Python of a step once per program, when it traces it. A shape that changes from
    batch to batch means a new program each time: minutes of compilation that look like slow
    training.
    """

    def __init__(
        self, step: Callable[[Any, Any], Any], expected: int, say: Callable[[str], None]
    ) -> None:
        self.count = 0
        self._step, self._expected, self._say = step, expected, say

    def __call__(self, state: Any, batch: Any) -> Any:
        """Traces the step; pass the object to `parallelize`."""
        self.count += 1
        if self.count > self._expected:
            shapes = ", ".join(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} {list(x.shape)}"
                for path, x in jax.tree.leaves_with_path(batch)
            )
            self._say(
                f"warning: compiling program {self.count} of the step, expected {self._expected}; "
                f"training waits for each compilation (batch: {shapes})"
            )
        return self._step(state, batch)


def split_batch(batch: Any, replicas: int) -> Any:
    """[B, ...] -> [replicas, B / replicas, ...] for every array; B must be a multiple."""
    return jax.tree.map(lambda x: x.reshape(replicas, x.shape[0] // replicas, *x.shape[1:]), batch)


def merge_batch(tree: Any) -> Any:
    """[replicas, b, ...] -> NumPy [replicas * b, ...] for every array of a split output; each of
    several processes gets its own replicas."""

    def local(x: Any) -> np.ndarray:
        if jax.process_count() == 1:
            return np.asarray(x)
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(lambda x: local(x).reshape(-1, *x.shape[2:]), tree)


def choose_devices(count: int) -> list[Device]:
    """The first `count` devices, or all for 0. Jobs of several processes use all devices.

    Raises:
        ConfigError: JAX finds none.
    """
    try:
        devices = jax.devices()
    except Exception as error:  # RuntimeError, AssertionError: whatever a backend does
        asked = os.environ.get("JAX_PLATFORMS", "")
        if asked:
            problem = f"JAX has no device for JAX_PLATFORMS={asked!r}"
            remedy = "set JAX_PLATFORMS=cpu, or install JAX for that platform"
        else:
            reason = str(error).partition("\n")[0] or type(error).__name__
            problem = f"JAX cannot start a device ({reason[:150]})"
            remedy = "set JAX_PLATFORMS=cpu, or reinstall JAX for this machine"
        raise ConfigError("devices", problem, remedy) from error
    return devices[: count or len(devices)] if jax.process_count() == 1 else devices


def use_cpu_cores(batch_sizes: tuple[int, ...]) -> None:
    """Gives the CPU backend one device per core, or fewer, so that they divide every batch size.

    Call it before JAX is used. XLA runs one convolution on few threads, so replicas use the cores
    better. No effect on accelerators, if the user set a number, or if JAX is already running.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = max(n for n in range(1, (cores or 1) + 1) if all(b % n == 0 for b in batch_sizes))
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend is running: its devices cannot change
        return


def keep_programs(directory: Path | None) -> None:
    """Makes JAX cache compiled programs, so that the next run of the same step starts quickly.

    No effect without a directory, or if the user chose one for JAX (JAX_COMPILATION_CACHE_DIR).
    Programs for a CPU are cached per host: they use its instruction set, and the directory may be
    shared. No effect in a job of several processes either: JAX caches for the first one only, which
    would then wait for the others while they compile, on CPUs for no more than 30 seconds.

    Args:
        directory: of the cache, or None.
    """
    if not directory or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if jax.process_count() == 1:
        if jax.default_backend() == "cpu":
            directory = directory / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(directory))

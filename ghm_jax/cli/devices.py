"""Devices and compiled programs: how every command that computes starts."""

from ghm_jax.config import Config
from ghm_jax.storage import cache_directory


def start_devices(config: Config, *batch_sizes: int, joined: bool = False) -> None:
    """Checks the config without devices, so that errors come at once, then lets JAX start.

    On CPU the cores become devices, and compiled programs are cached for the next command.

    Args:
        config: of the run.
        batch_sizes: of the steps that the command runs; empty: of training and evaluation.
        joined: whether this is one of several processes, whose devices are fixed.
    """
    config.check()

    from ghm_jax.distributed.devices import choose_devices, keep_programs, use_cpu_cores

    if not joined:
        sizes = batch_sizes or (config.optimizer.batch_size, config.predict.batch_size)
        use_cpu_cores(sizes)
    choose_devices(0)  # raises where there is none
    keep_programs(cache_directory("programs"))

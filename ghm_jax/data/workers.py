"""What the worker processes that decode images need of the machine."""

import multiprocessing
import shutil
from pathlib import Path
from typing import NamedTuple

from ghm_jax.config import Data
from ghm_jax.exceptions import ConfigError

_SHARED_MEMORY = Path("/dev/shm")
# Of each worker: Grain keeps up to 2 in its queue, 1 that it makes, and 5 that wait for the step
# (measured with a slow reader: 8 with one worker, 14 with two).
_BATCHES = 8


class SharedMemory(NamedTuple):
    """Shared memory in bytes."""

    free: int
    needed: int
    """By all workers together, if the step is slower than they are."""


def shared_memory(data: Data, batch_size: int, workers: int) -> SharedMemory | None:
    """What workers need to hand over batches of `batch_size` images; None: a machine without
    /dev/shm, where shared memory is not limited by it."""
    if not _SHARED_MEMORY.is_dir():
        return None
    pixels = max(height * width for height, width in data.buckets)
    needed = _BATCHES * workers * batch_size * pixels * 3
    return SharedMemory(shutil.disk_usage(_SHARED_MEMORY).free, needed)


def check_workers(data: Data, batch_size: int, workers: int) -> None:
    """Whether the worker processes can run: without room they die in the middle of the work.

    Args:
        data: `buckets` are used.
        batch_size: images of a batch on this host.
        workers: `run.workers`; 0: none are needed.

    Raises:
        ConfigError: they cannot, with the remedy.
    """
    if not workers:
        return
    try:
        multiprocessing.get_context("spawn").Semaphore()
    except (OSError, ImportError) as error:  # no /dev/shm, or not writable
        raise ConfigError(
            "run.workers",
            f"this machine has no semaphores for worker processes ({error})",
            "mount /dev/shm so that this user can write to it, or set `run.workers` 0",
        ) from error
    memory = shared_memory(data, batch_size, workers)
    if memory is not None and memory.free < memory.needed:
        megabytes = -(-memory.needed // 10**6)
        raise ConfigError(
            "run.workers",
            f"{workers} workers need {megabytes} MB of shared memory, and "
            f"{memory.free / 1e6:.0f} MB of /dev/shm are free",
            f"give the container --shm-size {-(-memory.needed // 2**20)}m, or set `run.workers` "
            "lower (0: this process decodes)",
        )

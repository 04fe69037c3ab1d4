"""How the processes of a job agree: one process per host (or device), all with the same program.

All processes must call each of these functions at the same point. With one process they are free.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # nothing public waits without a computation
from jax.experimental import multihost_utils

from ghm_jax.exceptions import StoppedElsewhere


def start_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a job; call it before JAX is used.

    Args:
        coordinator: HOST:PORT of process 0; each process then has all devices of its host. None
            (for all three): `jax.distributed` detects them on TPU pods (one process per host),
            under SLURM and under Open MPI 4 (one process per GPU).
        num_processes: of the job.
        process_id: of this process, from 0.

    Raises:
        ValueError, RuntimeError: nothing was detected, or the other processes did not answer.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs only
    # Detection of SLURM and Open MPI would give a process one GPU, whatever the arguments say.
    detection = None if coordinator is None else "deactivate"
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method=detection
    )


def is_first() -> bool:
    """Whether this is the process that writes files and messages."""
    return jax.process_index() == 0


def global_max(number: int) -> int:
    """The largest number of all processes. Waits until the devices have finished their work."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number)).max())


def gather_rows(rows: list[Any]) -> list[Any]:
    """The rows of all processes, in process order, for each of them. Rows must be JSON data."""
    if jax.process_count() == 1:
        return rows
    data = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    gathered = multihost_utils.process_allgather(padded)
    return [
        row
        for encoded, size in zip(gathered, sizes, strict=True)
        for row in json.loads(np.asarray(encoded)[: int(size)].tobytes())
    ]


def on_first_process(compute: Callable[[], Any]) -> Any:
    """What the first process computes, for all of them. It must be JSON data."""
    return gather_rows([compute()] if is_first() else [])[0]


LONGEST_WAIT = 3 * 3600
"""Seconds that processes wait for one that has more to do, such as to copy data to its disk."""


def _wait_for_all() -> None:
    """Returns when all processes are here. A computation of all devices would give up earlier, on
    CPUs after 30 seconds. A process that has died ends the wait of the others."""
    if jax.process_count() > 1:
        client: Any = distributed.global_state.client
        client.wait_at_barrier("ghm_jax", timeout_in_ms=1000 * LONGEST_WAIT)


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """All processes leave the block without an error, or none does.

    The error of the first process that had one is raised there; all others raise StoppedElsewhere.

    Raises:
        StoppedElsewhere: there was an error in another process.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    _wait_for_all()
    found = [] if problem is None else [[jax.process_index(), str(problem)]]
    for index, message in gather_rows(found)[:1]:
        if problem is not None and index == jax.process_index():
            raise problem
        raise StoppedElsewhere(f"process {index}: {message}")

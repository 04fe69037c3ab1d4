"""How the processes of a job agree: one process a host (or a device), all with the same program.

All processes call each of these functions at the same point. Alone, a process pays nothing for it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ghm_jax.exceptions import StoppedElsewhere


def start_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a job into one; call it before JAX is used.

    Args:
        coordinator: HOST:PORT of process 0; each process then has all devices of its host. None, as
            the others: `jax.distributed` finds them all on TPU pods (one process a host), under
            SLURM and under Open MPI 4 (one process a GPU).
        num_processes: of the job.
        process_id: of this one, from 0.

    Raises:
        ValueError, RuntimeError: nothing was found, or the others did not answer.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs only
    # What SLURM and Open MPI tell would leave a process one GPU, whatever was asked for here.
    detection = None if coordinator is None else "deactivate"
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method=detection
    )


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """The largest of the processes' numbers. The devices finish what they were given before."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number)).max())


def gather_rows(rows: list[Any]) -> list[Any]:
    """Rows of all processes, in their order, in each of them. Rows are what JSON can hold."""
    if jax.process_count() == 1:
        return rows
    data = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    parts = multihost_utils.process_allgather(padded)
    return [
        row
        for part, size in zip(parts, sizes, strict=True)
        for row in json.loads(np.asarray(part)[: int(size)].tobytes())
    ]


def computed_once(compute: Callable[[], Any]) -> Any:
    """What the first process computes, in all of them. It is what JSON can hold."""
    return gather_rows([compute()] if is_first() else [])[0]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """All processes leave the block without an error, or none does.

    An error is raised where it happened; of several the first process's is, and the others raise

    Raises:
        StoppedElsewhere: there was an error in another process.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    found = [] if problem is None else [[jax.process_index(), str(problem)]]
    for index, message in gather_rows(found)[:1]:
        if problem is not None and index == jax.process_index():
            raise problem
        raise StoppedElsewhere(f"process {index}: {message}")

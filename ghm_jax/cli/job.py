"""A command as one process of several. They join first, so that errors are reported once."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from ghm_jax.cli.arguments import Arguments, parse
from ghm_jax.exceptions import ArgumentError


@dataclass
class Distributed:
    """A job of several processes, which all run the same command with their own process id."""

    detect: bool = False
    """Detect the other processes on TPU pods, under SLURM or Open MPI 4."""
    coordinator: str = ""
    """HOST:PORT of process 0, if nothing can be detected."""
    num_processes: int = 0
    """Number of processes of the job, with a coordinator."""
    process_id: int = -1
    """Index of this process, from 0, with a coordinator."""


@dataclass
class _Job:
    distributed: Distributed = field(default_factory=Distributed)


def join_processes(arguments: Arguments) -> bool:
    """Starts `jax.distributed` if the arguments ask for it; returns whether they do.

    Raises:
        ArgumentError: they do not describe a job, or the other processes did not answer.
    """
    given = arguments.section("distributed")
    if not given.options or arguments.help_wanted:
        return False
    how = parse(_Job, given, "ghm-jax").distributed
    explicit = (how.coordinator, how.num_processes, how.process_id)
    if not how.detect and not (how.coordinator and 0 <= how.process_id < how.num_processes):
        raise ArgumentError(
            "distributed",
            f"the coordinator, number of processes and process id {explicit} do not describe a job",
            "give `distributed.coordinator` HOST:PORT, `distributed.num_processes` N and "
            "`distributed.process_id` 0 to N - 1, or `distributed.detect`",
        )

    from ghm_jax.distributed.processes import start_processes

    try:
        if how.detect:
            start_processes()
        else:
            start_processes(*explicit)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentError(
            "distributed",
            reason,
            "give `distributed.coordinator`, `distributed.num_processes` and "
            "`distributed.process_id` of a job whose process 0 can be reached",
        ) from None
    return True


@contextlib.contextmanager
def hurried_exit(job: bool, patience: float = 20.0) -> Iterator[None]:
    """A process of a job that fails alone exits soon, which ends the others as well.

    At its end a process waits up to five minutes, in JAX, for all others to end. If all of them
    fail, they exit without this timeout.

    Args:
        job: whether there are other processes.
        patience: seconds from the failure to the exit.
    """

    def end() -> None:
        sys.stdout.flush()
        os._exit(1)

    try:
        yield
    except BaseException:
        if job:
            timer = threading.Timer(patience, end)
            timer.daemon = True
            timer.start()
        raise

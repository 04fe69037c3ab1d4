"""A command as one process of several. They join first, so that what is wrong is said once."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from ghm_jax.cli.arguments import parse
from ghm_jax.exceptions import ConfigError

PREFIX = "--distributed."


@dataclass
class Distributed:
    """A job of several processes; all give the same command but for the process id."""

    detect: bool = False
    """Find the other processes by what TPU pods, SLURM and Open MPI 4 tell."""
    coordinator: str = ""
    """HOST:PORT of process 0, where nothing can be detected."""
    num_processes: int = 0
    """Processes of the job, with a coordinator."""
    process_id: int = -1
    """Which one this is, from 0, with a coordinator."""


@dataclass
class _Job:
    distributed: Distributed = field(default_factory=Distributed)


def join_processes(args: list[str]) -> bool:
    """Starts `jax.distributed` where the arguments ask for it; whether they do.

    Raises:
        ConfigError: what they say is no job, or the other processes did not answer.
    """
    given = _of_job(args)
    if not given or "-h" in args or "--help" in args:
        return False
    how = parse(_Job, given, "ghm-jax").distributed
    explicit = (how.coordinator, how.num_processes, how.process_id)
    if not how.detect and not (how.coordinator and 0 <= how.process_id < how.num_processes):
        raise ConfigError(
            f"{PREFIX}*: a job needs {PREFIX}coordinator HOST:PORT, .num-processes N and "
            f".process-id 0 to N - 1, got {explicit}; or {PREFIX}detect"
        )

    from ghm_jax.distributed.processes import start_processes

    try:
        if how.detect:
            start_processes()
        else:
            start_processes(*explicit)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{PREFIX}*: {reason}; give {PREFIX}coordinator, .num-processes and .process-id of a "
            "process 0 that can be reached"
        ) from None
    return True


@contextlib.contextmanager
def hurried_exit(job: bool, patience: float = 20.0) -> Iterator[None]:
    """Where a process of a job fails alone, it ends soon, and by that the others.

    JAX waits five minutes at the end of a process for all the others to end too. If they do, at a
    failure of all of them, nothing is hurried.

    Args:
        job: whether there are other processes.
        patience: seconds from the failure to the end.
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


def _of_job(args: list[str]) -> list[str]:
    """The options of `Distributed` among all arguments, with their values."""
    found, inside = [], False
    for arg in args:
        inside = arg.startswith(PREFIX) or (inside and not arg.startswith("--"))
        if inside:
            found.append(arg)
    return found

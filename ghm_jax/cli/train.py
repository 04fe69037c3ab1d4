"""`ghm-jax train`."""

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import AllSettings, Arguments, parse
from ghm_jax.cli.devices import start_devices
from ghm_jax.cli.job import Distributed, hurried_exit, join_processes
from ghm_jax.cli.messages import Bar, as_options, fail
from ghm_jax.config import Config
from ghm_jax.exceptions import ArgumentError
from ghm_jax.runs.experiments import experiment_name, load_experiment


@dataclass
class Train:
    """Trains a detector, or resumes a run that was stopped."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`, or FILE:ROW for one of its `configs`."""
    run_dir: str = ""
    """Directory of the run (runs/ and the experiment's name)."""
    restart: bool = False
    """Move an existing run aside and train from scratch."""
    profile: Annotated[str, tyro.conf.arg(metavar="N:M")] = ""
    """Write a JAX profile of steps N to M into the run's directory."""
    distributed: Distributed = field(default_factory=Distributed)
    config: AllSettings = field(default_factory=Config)


def train_command(arguments: Arguments) -> None:
    """`ghm-jax train`."""
    from ghm_jax.distributed.processes import is_first, raise_together
    from ghm_jax.runs.checkpoint import CheckpointFailed
    from ghm_jax.train import train
    from ghm_jax.training.interrupt import TrainingInterrupted
    from ghm_jax.training.log import TrainingDiverged

    job = join_processes(arguments)
    with raise_together() if job else contextlib.nullcontext():
        (experiment,) = arguments.required(1, "ghm-jax train EXPERIMENT")
        default = load_experiment(experiment) if experiment else Config()
        a = parse(Train, arguments, "ghm-jax train", Train(experiment, config=default))
        run_dir = a.run_dir or f"runs/{experiment_name(a.experiment)}"
        profile = steps_to_profile(a.profile)
        start_devices(a.config, joined=job)
    try:
        with hurried_exit(job), Bar() as bar:
            train(a.config, run_dir, restart=a.restart, profile=profile, progress=bar)
    except TrainingDiverged as error:
        fail(as_options(str(error)) if is_first() else None)
    except CheckpointFailed as error:
        fail(as_options(str(error)))
    except TrainingInterrupted as error:
        if is_first():
            again = " ".join(["ghm-jax train", *(w for w in arguments.words if w != "--restart")])
            again = "the same commands" if job else again
            print(f"ghm-jax: {error}; resume with: {again}", file=sys.stderr)
        sys.exit(0 if error.preempted else 130)
    if is_first():
        print(f"{run_dir}: done; evaluate it with: ghm-jax evaluate {run_dir}")


def steps_to_profile(text: str) -> tuple[int, int] | None:
    """The first and the last step of `N:M`; None for an empty text."""
    if not text:
        return None
    first, separator, last = text.partition(":")
    if not (separator and first.isdecimal() and last.isdecimal()):
        raise ArgumentError("profile", f"{text!r} is not N:M", "give two steps, such as 10:12")
    return int(first), int(last)

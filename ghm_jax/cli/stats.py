"""The command that shows what the losses of a run see."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import parse, positional
from ghm_jax.cli.runs import start_devices
from ghm_jax.cli.tables import gradient_table
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.directory import load_run


@dataclass
class Stats:
    """Gradient norms, weights and gradients of both losses: stats.json and two pictures."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    out: str = ""
    """Directory for the files (the run's)."""
    split: str = ""
    """Split to look at (the run's validation split)."""
    images: int = 500
    """At most so many images, in whole training batches."""


def stats_command(args: list[str]) -> None:
    """`ghm-jax stats`."""
    from ghm_jax.progress import Bar

    directory = positional(args, "ghm-jax stats RUN")
    a = parse(Stats, args, "ghm-jax stats", Stats(directory or ""))
    if a.images < 1:
        raise ConfigError(f"--images: must be positive, got {a.images}")
    _, config = load_run(a.run)
    start_devices(config)

    from ghm_jax.analysis.gradient_stats import write_stats
    from ghm_jax.plots.panel import LOSS_NAMES

    stats, paths = write_stats(
        a.run, a.out or None, split=a.split or None, images=a.images, progress=Bar()
    )
    for key, what in (("classification", "class scores"), ("box", "box coordinates")):
        print(gradient_table(what, stats[key], LOSS_NAMES))
    for path in paths:
        print(path)

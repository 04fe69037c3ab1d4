"""`ghm-jax stats`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import Arguments, DataPlace, check_positive, parse
from ghm_jax.cli.devices import start_devices
from ghm_jax.cli.messages import Bar
from ghm_jax.cli.tables import gradient_table
from ghm_jax.runs.directory import load_run


@dataclass
class Stats:
    """Gradient norms, weights and gradients of both losses: stats.json and two pictures."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    out: str = ""
    """Directory for the files (the run's)."""
    split: str = ""
    """Split to measure (the run's validation split)."""
    images: int = 500
    """Maximum number of images, in whole training batches."""
    data: DataPlace = field(default_factory=DataPlace)


def stats_command(arguments: Arguments) -> None:
    """`ghm-jax stats`."""
    (directory,) = arguments.required(1, "ghm-jax stats RUN")
    a = parse(Stats, arguments, "ghm-jax stats", Stats(directory))
    check_positive(images=a.images)
    start_devices(load_run(a.run)[1])

    from ghm_jax.analysis.gradient_stats import write_stats
    from ghm_jax.plots.panel import loss_name

    with Bar() as bar:
        stats, paths = write_stats(
            a.run,
            a.out or None,
            split=a.split or None,
            images=a.images,
            data_dir=a.data.dir or None,
            progress=bar,
        )
    for key, what in (("classification", "class scores"), ("box", "box coordinates")):
        print(gradient_table(what, stats[key], loss_name))
    for path in paths:
        print(path)

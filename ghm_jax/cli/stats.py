"""`ghm-jax stats`."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ghm_jax.cli.arguments import Arguments, check_positive, parse
from ghm_jax.cli.devices import start_devices
from ghm_jax.cli.messages import Bar
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


def stats_command(arguments: Arguments) -> None:
    """`ghm-jax stats`."""
    (directory,) = arguments.required(1, "ghm-jax stats RUN")
    a = parse(Stats, arguments, "ghm-jax stats", Stats(directory))
    check_positive(images=a.images)
    start_devices(load_run(a.run)[1])

    from ghm_jax.analysis.gradient_stats import write_stats
    from ghm_jax.plots.panel import LOSS_NAMES

    stats, paths = write_stats(
        a.run, a.out or None, split=a.split or None, images=a.images, progress=Bar()
    )
    for key, what in (("classification", "class scores"), ("box", "box coordinates")):
        print(_table(what, stats[key], LOSS_NAMES))
    for path in paths:
        print(path)


def _table(what: str, part: dict[str, Any], names: dict[str, str]) -> str:
    """Shares of examples and gradient by difficulty, as text."""
    groups = part["difficulty"].values()
    rows = {f"examples: {what}": [group["examples"] for group in groups]}
    for loss in part["gradient"]:
        label = f"gradient: {names[loss]}" + (" (this run)" if loss == part["loss"] else "")
        rows[label] = [group["gradient"][loss] for group in groups]
    lines = [" " * 32 + "".join(f"{label:>10}" for label in part["difficulty"])]
    for label, values in rows.items():
        lines.append(f"{label:<32}" + "".join(f"{100 * value:>8.2f} %" for value in values))
    return "\n".join(lines)

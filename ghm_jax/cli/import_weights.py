"""`ghm-jax import`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import AllSettings, Arguments, parse
from ghm_jax.config import Config
from ghm_jax.runs.experiments import load_experiment


@dataclass
class Import:
    """Makes a run of a published detector, to evaluate, export or train further."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """RetinaNet of torchvision or mmdetection: .safetensors, .pth, or hf://OWNER/NAME[/FILE]."""
    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config` of the same network."""
    run_dir: str = ""
    """Directory of the run (runs/ and the name of the weights)."""
    config: AllSettings = field(default_factory=Config)


def import_command(arguments: Arguments) -> None:
    """`ghm-jax import`."""
    from ghm_jax.cli.messages import Bar
    from ghm_jax.import_weights import import_run

    weights, experiment = arguments.required(2, "ghm-jax import WEIGHTS EXPERIMENT")
    default = load_experiment(experiment) if experiment else Config()
    given = Import(weights, experiment, config=default)
    a = parse(Import, arguments, "ghm-jax import", given)
    run_dir = a.run_dir or f"runs/{Path(a.weights).stem}"
    import_run(a.weights, a.config, run_dir, progress=Bar())
    print(f"{run_dir}: ready; evaluate it with: ghm-jax evaluate {run_dir}")

"""`ghm-jax describe`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import AllSettings, Arguments, check_positive, parse
from ghm_jax.config import Config, Data
from ghm_jax.exceptions import ArgumentError
from ghm_jax.runs.experiments import load_experiment


@dataclass
class Describe:
    """Cost of the detector of an experiment: parameters, multiply-adds and anchors per image."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`, or FILE:ROW for one of its `configs`."""
    size: tuple[int, int] = (800, 1280)
    """Height and width of the image in pixels."""
    classes: int = 0
    """Number of classes (that of the data set)."""
    config: AllSettings = field(default_factory=Config)


def describe_command(arguments: Arguments) -> None:
    """`ghm-jax describe`."""
    import jax

    from ghm_jax.analysis.cost import describe
    from ghm_jax.cli.tables import description_table

    (experiment,) = arguments.required(1, "ghm-jax describe EXPERIMENT")
    default = load_experiment(experiment) if experiment else Config()
    a = parse(Describe, arguments, "ghm-jax describe", Describe(experiment, config=default))
    config = a.config.check()
    check_positive(size=a.size)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    num_classes = a.classes or _num_classes(config.data)
    print(f"{config.model.backbone}, {description_table(describe(config, num_classes, a.size))}")


def _num_classes(data: Data) -> int:
    """Number of classes of a data set, without building one."""
    if data.classes:
        return len(data.classes)
    if data.name.startswith("coco/"):
        return 80
    if data.name and not (Path(data.dir) / data.name).is_dir():
        raise ArgumentError(
            "classes",
            f"unknown, because {data.name} is not in {data.dir}",
            "give their number, or set `data.dir`",
        )
    from ghm_jax.data.dataset import open_dataset

    return len(open_dataset(data, data.train_split).class_names)

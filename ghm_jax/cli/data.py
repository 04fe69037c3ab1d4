"""`ghm-jax data`: commands that prepare data sets and inspect them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import AllSettings, Arguments, parse
from ghm_jax.cli.messages import Bar
from ghm_jax.config import Config
from ghm_jax.exceptions import ArgumentError
from ghm_jax.runs.experiments import load_experiment


@dataclass
class PrepareFolder:
    """Converts images with COCO annotations to a data set to train on."""

    name: str
    """Name of the new data set."""
    train: tuple[str, str] | None = None
    """Directory of images and instances JSON."""
    validation: tuple[str, str] | None = None
    """Directory of images and instances JSON."""
    test: tuple[str, str] | None = None
    """Directory of images and a JSON that lists them, with or without annotations."""
    out: str = "data"
    """Directory of data sets (data.dir of a run)."""
    subset: str = "100%"
    """Percentage of the images of every split."""


def prepare_folder_command(arguments: Arguments) -> None:
    """`ghm-jax data prepare folder`."""
    from ghm_jax.data.prepare.coco_folder import prepare_folder

    a = parse(PrepareFolder, arguments, "ghm-jax data prepare folder")
    given = {"train": a.train, "validation": a.validation, "test": a.test}
    splits = {split: paths for split, paths in given.items() if paths}
    if not splits:
        raise ArgumentError(
            "train",
            "no split is given",
            "give IMAGES_DIR ANNOTATIONS.json to at least one of `train`, `validation` and `test`",
        )
    with Bar() as bar:
        path = prepare_folder(a.name, a.out, splits, subset=_fraction(a.subset), progress=bar)
    print(f"{path}: ready; train with: ghm-jax train experiments/folder.py --data.dir {a.out}")


@dataclass
class PrepareCoco:
    """Converts the unpacked official COCO files to a data set to train on."""

    source: str
    """Directory with train2017/, val2017/ and annotations/ (or 2014)."""
    out: str = "data"
    """Directory of data sets (data.dir of a run)."""
    splits: tuple[str, ...] = ()
    """Any of train, validation, test, and for 2017 test_dev (train and validation, if they are in
    the source)."""
    subset: str = "100%"
    """Percentage of the images of every split, for example 1%."""


def prepare_coco_command(year: str) -> Callable[[Arguments], None]:
    """`ghm-jax data prepare coco/YEAR`."""

    def prepare(arguments: Arguments) -> None:
        from ghm_jax.data.prepare.coco_official import prepare_coco

        a = parse(PrepareCoco, arguments, f"ghm-jax data prepare coco/{year}")
        with Bar() as bar:
            path = prepare_coco(
                year, a.source, a.out, splits=a.splits, subset=_fraction(a.subset), progress=bar
            )
        print(f"{path}: ready; train with: ghm-jax train EXPERIMENT --data.dir {a.out}")

    return prepare


def _fraction(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?%", text):
        raise ArgumentError("subset", f"{text!r} is not a percentage", "write it like 1% or 0.5%")
    return float(text[:-1]) / 100


@dataclass
class Inspect:
    """Draws the first training batches of an experiment and prints their statistics."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`."""
    out: str = "inspection"
    """Directory for the pictures and statistics.json."""
    batches: int = 20
    """Batches to measure."""
    pictures: int = 4
    """Batches to draw."""
    config: AllSettings = field(default_factory=Config)


def inspect_command(arguments: Arguments) -> None:
    """`ghm-jax data inspect`."""
    (experiment,) = arguments.required(1, "ghm-jax data inspect EXPERIMENT")
    default = load_experiment(experiment) if experiment else Config()
    a = parse(Inspect, arguments, "ghm-jax data inspect", Inspect(experiment, config=default))
    a.config.check()

    from ghm_jax.analysis.data_preview import inspect_data
    from ghm_jax.cli.tables import inspection_table
    from ghm_jax.distributed.devices import choose_devices

    choose_devices(0)  # raises where there is none

    with Bar() as bar:
        inspection, files = inspect_data(
            a.config, a.out, batches=a.batches, pictures=a.pictures, progress=bar
        )
    print(inspection_table(inspection))
    print(f"\nwritten: {', '.join(map(str, files))}")

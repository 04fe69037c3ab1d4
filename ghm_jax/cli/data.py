"""Commands that make data sets and look into them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import AllSettings, parse, positional
from ghm_jax.config import Config
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.experiments import load_experiment


@dataclass
class PrepareFolder:
    """Turns images with COCO annotations into a data set to train on."""

    name: str
    """Of the new data set."""
    train: tuple[str, str] | None = None
    """Directory of images and instances JSON."""
    validation: tuple[str, str] | None = None
    """Directory of images and instances JSON."""
    test: tuple[str, str] | None = None
    """Directory of images and a JSON that lists them, with or without annotations."""
    out: str = "data"
    """Directory of data sets (data.dir of a run)."""
    subset: str = "100%"
    """Share of the images of every split."""


def prepare_folder_command(args: list[str]) -> None:
    """`ghm-jax data prepare folder`."""
    from ghm_jax.data.prepare.coco_folder import prepare_folder
    from ghm_jax.progress import Bar

    a = parse(PrepareFolder, args, "ghm-jax data prepare folder")
    given = {"train": a.train, "validation": a.validation, "test": a.test}
    splits = {split: paths for split, paths in given.items() if paths}
    if not splits:
        raise ConfigError("--train: give it, --validation or --test: IMAGES_DIR ANNOTATIONS.json")
    path = prepare_folder(a.name, a.out, splits, subset=_share(a.subset), progress=Bar())
    print(f"{path}: ready; train with: ghm-jax train experiments/folder.py --data.dir {a.out}")


@dataclass
class PrepareCoco:
    """Turns the unpacked official COCO files into a data set to train on."""

    source: str
    """Directory with train2017/, val2017/ and annotations/ (or 2014)."""
    out: str = "data"
    """Directory of data sets (data.dir of a run)."""
    splits: tuple[str, ...] = ()
    """Of train, validation, test, and for 2017 test_dev; left out: train and validation, as far as
    they are in the source."""
    subset: str = "100%"
    """Share of the images of every split, for example 1%."""


def prepare_coco_command(year: str) -> Callable[[list[str]], None]:
    """`ghm-jax data prepare coco/YEAR`."""

    def prepare(args: list[str]) -> None:
        from ghm_jax.data.prepare.coco_official import prepare_coco
        from ghm_jax.progress import Bar

        a = parse(PrepareCoco, args, f"ghm-jax data prepare coco/{year}")
        path = prepare_coco(
            year, a.source, a.out, splits=a.splits, subset=_share(a.subset), progress=Bar()
        )
        print(f"{path}: ready; train with: ghm-jax train EXPERIMENT --data.dir {a.out}")

    return prepare


def _share(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?%", text):
        raise ConfigError(f"--subset: {text!r} is no share; write it like 1% or 0.5%")
    return float(text[:-1]) / 100


@dataclass
class Inspect:
    """Draws the first training batches of an experiment and prints statistics of them."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`."""
    out: str = "inspection"
    """Directory for the pictures and statistics.json."""
    batches: int = 20
    """Batches to measure."""
    pictures: int = 4
    """Batches to draw."""
    config: AllSettings = field(default_factory=Config)


def inspect_command(args: list[str]) -> None:
    """`ghm-jax data inspect`."""
    experiment = positional(args, "ghm-jax data inspect EXPERIMENT")
    default = load_experiment(experiment) if experiment else Config()
    a = parse(Inspect, args, "ghm-jax data inspect", Inspect(experiment or "", config=default))
    a.config.check()

    from ghm_jax.analysis.data_preview import inspect_data
    from ghm_jax.cli.tables import inspection_table
    from ghm_jax.progress import Bar

    inspection, files = inspect_data(
        a.config, a.out, batches=a.batches, pictures=a.pictures, progress=Bar()
    )
    print(inspection_table(inspection))
    print(f"\nwritten: {', '.join(map(str, files))}")

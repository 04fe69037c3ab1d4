"""Commands that make data sets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ghm_jax.cli.arguments import parse
from ghm_jax.config import ConfigError


@dataclass
class PrepareFolder:
    """Turns images with COCO annotations into a data set to train on."""

    name: str
    """Of the new data set."""
    train: tuple[str, str]
    """Directory of images and instances JSON."""
    out: str = "data"
    """Directory of data sets (data.dir of a run)."""
    validation: tuple[str, str] | None = None
    """Directory of images and instances JSON."""


def prepare_folder_command(args: list[str]) -> None:
    """`ghm-jax data prepare folder`."""
    from ghm_jax.data.coco_directory import prepare_folder

    a = parse(PrepareFolder, args, "ghm-jax data prepare folder")
    splits = {"train": a.train} | ({"validation": a.validation} if a.validation else {})
    path = prepare_folder(a.name, a.out, splits)
    print(f"{path}: ready; train with: ghm-jax train experiments/folder.py --data.dir {a.out}")


@dataclass
class PrepareCoco:
    """Turns the unpacked official COCO files into a data set to train on."""

    source: str
    """Directory with train2017/, val2017/ and annotations/ (or 2014)."""
    out: str = "data"
    """Directory of data sets (data.dir of a run)."""


def prepare_coco_command(year: str) -> Callable[[list[str]], None]:
    """`ghm-jax data prepare coco/YEAR`."""

    def prepare(args: list[str]) -> None:
        from ghm_jax.data.coco_directory import prepare_folder

        a = parse(PrepareCoco, args, f"ghm-jax data prepare coco/{year}")
        source = Path(a.source)
        splits = {
            split: (source / f"{part}{year}", source / f"annotations/instances_{part}{year}.json")
            for split, part in (("train", "train"), ("validation", "val"))
            if (source / f"{part}{year}").is_dir()
        }
        if not splits:
            raise ConfigError(
                f"--source: neither train{year}/ nor val{year}/ in {source}; "
                "unpack the official archives there"
            )
        path = prepare_folder(f"coco/{year}", a.out, splits)
        print(f"{path}: ready; train with: ghm-jax train EXPERIMENT --data.dir {a.out}")

    return prepare

"""`ghm-jax export`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ghm_jax.cli.arguments import Arguments, DataPlace, parse
from ghm_jax.cli.messages import Bar


@dataclass
class Export:
    """Writes the newest checkpoint of a run for other programs."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    out: str
    """File to write; .safetensors: weights with torchvision's names; .stablehlo: the detector as a
    program that needs only JAX, with a JSON file that says how to call it."""
    batch_size: int | None = None
    """.stablehlo: images per call (1)."""
    size: tuple[int, int] | None = None
    """.stablehlo: height and width of the images, multiples of 32 (the run's first bucket)."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] | None = None
    """.stablehlo: platforms it can run on (all of them)."""
    data: DataPlace = field(default_factory=DataPlace)


def export_command(arguments: Arguments) -> None:
    """`ghm-jax export`."""
    (directory,) = arguments.required(1, "ghm-jax export RUN --out FILE")
    a = parse(Export, arguments, "ghm-jax export", Export(directory, tyro.MISSING))

    from ghm_jax.export import export

    shape = {"batch_size": a.batch_size, "size": a.size, "platforms": a.platforms}
    with Bar() as bar:
        files = export(a.run, a.out, data_dir=a.data.dir or None, progress=bar, **shape)
    for path in files:
        print(f"{path}: written")

"""`ghm-jax predict`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import Arguments, DataPlace, parse
from ghm_jax.cli.devices import start_devices
from ghm_jax.cli.messages import Bar
from ghm_jax.runs.directory import load_run
from ghm_jax.storage import as_path

_TURNED = "have an orientation tag, which is not applied: boxes are in the pixels as stored"


@dataclass
class Predict:
    """Detects objects on image files: drawn images, predictions.json, contact_sheet.jpg."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files, folders, or glob patterns in quotes."""
    out: str
    """New directory for the output."""
    batch_size: int = 0
    """Images per step (predict.batch_size of the run)."""
    threshold: float = 0.3
    """Minimum score of a detection."""
    data: DataPlace = field(default_factory=DataPlace)


def predict_command(arguments: Arguments) -> None:
    """`ghm-jax predict`."""
    (directory,) = arguments.required(1, "ghm-jax predict RUN IMAGE... --out DIR")
    given = Predict(directory, tyro.MISSING, tyro.MISSING)
    a = parse(Predict, arguments, "ghm-jax predict", given)
    _, config = load_run(a.run)
    start_devices(config, a.batch_size or config.predict.batch_size)

    from ghm_jax.predict import predict

    with Bar() as bar:
        done = predict(
            a.run,
            a.images,
            a.out,
            batch_size=a.batch_size,
            threshold=a.threshold,
            data_dir=a.data.dir or None,
            progress=bar,
        )
    others = [f"{p}: unsupported image format {p.suffix or '(no suffix)'}" for p in done.not_images]
    skipped = [*done.unreadable, *others]
    for line in skipped[:10]:
        print(f"skipped {line}", file=sys.stderr)
    if done.turned:
        print(f"{done.turned} images {_TURNED}", file=sys.stderr)
    said = f"; skipped {len(skipped)} files" if skipped else ""
    print(f"{done.detections} detections on {done.images} images{said}")
    print(f"overview: {as_path(a.out) / 'contact_sheet.jpg'}")

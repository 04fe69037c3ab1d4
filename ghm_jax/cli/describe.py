"""`ghm-jax describe`."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ghm_jax.cli.arguments import AllSettings, Arguments, check_out, check_positive, parse
from ghm_jax.config import Config, Data
from ghm_jax.exceptions import ArgumentError
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.storage import as_path


@dataclass
class Describe:
    """Cost of the detector of an experiment: parameters, multiply-adds and anchors per image, and
    with --topology what its compiled step needs on a TPU slice."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`, or FILE:ROW for one of its `configs`."""
    size: tuple[int, int] = (800, 1280)
    """Height and width of the image in pixels."""
    classes: int = 0
    """Number of classes (that of the data set)."""
    topology: str = ""
    """TPU slice to compile the step for, such as v5e:4x4; needs libtpu, but no TPU."""
    program: Literal["train", "predict"] = "train"
    """Step to compile: of training, or of evaluation and prediction."""
    batch_per_chip: int = 0
    """Images per chip (the batch size of the experiment, divided among the chips)."""
    out: str = ""
    """JSON file to write the compiled step's figures into."""
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
    check_positive(size=a.size, batch_per_chip=a.batch_per_chip or None)
    if a.out and not a.topology:
        raise ArgumentError("out", "is for the figures of a compiled step", "add `topology`")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    num_classes = a.classes or _num_classes(config.data)
    if a.topology:
        _describe_compiled(a, num_classes, " ".join(arguments.words))
        return
    print(f"{config.model.backbone}, {description_table(describe(config, num_classes, a.size))}")


def _describe_compiled(a: Describe, num_classes: int, words: str) -> None:
    """Compiles the step for `a.topology` and prints what it needs."""
    from ghm_jax.analysis.compiled import ENVIRONMENT, compile_for, find_slice
    from ghm_jax.cli.tables import compiled_table
    from ghm_jax.runs.records import write_record

    os.environ.update({**ENVIRONMENT, **os.environ})  # what the user set wins
    target = find_slice(a.topology)
    batch = a.batch_per_chip or _batch_per_chip(a, len(target.devices))
    if a.program == "train" and batch % a.config.optimizer.accumulate:
        raise ArgumentError(
            "batch_per_chip", f"{batch} is no multiple of optimizer.accumulate", "change one"
        )
    check_out(a.out)
    print(f"compiling for {a.topology}, which can take many minutes ...", flush=True)
    step = compile_for(
        a.config, num_classes, a.size, target, program=a.program, batch_per_chip=batch
    )
    print(f"{a.config.model.backbone}, {compiled_table(step)}")
    if a.out:
        write_record(
            a.out,
            f"ghm-jax describe {words}",
            step.as_record(),
            packages=("jax", "jaxlib", "libtpu"),
            device=f"compiled for {a.topology}, not run",
        )


def _batch_per_chip(a: Describe, chips: int) -> int:
    """The share of a chip in the batch of the experiment."""
    train = a.program == "train"
    size = a.config.optimizer.batch_size if train else a.config.predict.batch_size
    if size % chips:
        raise ArgumentError(
            "topology",
            f"{chips} chips cannot share a batch of {size} images evenly",
            "give `batch_per_chip`",
        )
    return size // chips


def _num_classes(data: Data) -> int:
    """Number of classes of a data set, without building one."""
    if data.classes:
        return len(data.classes)
    if data.name.startswith("coco/"):
        return 80
    if data.name and not (as_path(data.dir) / data.name).is_dir():
        raise ArgumentError(
            "classes",
            f"unknown, because {data.name} is not in {data.dir}",
            "give their number, or set `data.dir`",
        )
    from ghm_jax.data.dataset import describe_dataset

    return len(describe_dataset(data).class_names)

"""Commands that make a run or work on one."""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ghm_jax.cli.arguments import AllSettings, fail, parse, positional
from ghm_jax.cli.job import Distributed, hurried_exit, join_processes
from ghm_jax.config import Config, Data
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.runs.experiments import experiment_name, load_experiment
from ghm_jax.runs.storage import cache_directory

if TYPE_CHECKING:
    from ghm_jax.evaluation.results import Evaluation


@dataclass
class Train:
    """Trains a detector, or goes on with a run that was stopped."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`, or FILE:ROW for one of its `configs`."""
    run_dir: str = ""
    """Where the run goes (runs/ and the experiment's name)."""
    restart: bool = False
    """Move an existing run aside and start anew."""
    profile: Annotated[str, tyro.conf.arg(metavar="N:M")] = ""
    """Write a JAX profile of steps N to M into the run's directory."""
    distributed: Distributed = field(default_factory=Distributed)
    config: AllSettings = field(default_factory=Config)


def train_command(args: list[str]) -> None:
    """`ghm-jax train`."""
    from ghm_jax.distributed.processes import is_first, raise_together
    from ghm_jax.progress import Bar
    from ghm_jax.runs.checkpoint import CheckpointFailed
    from ghm_jax.train import train
    from ghm_jax.training.interrupt import TrainingInterrupted
    from ghm_jax.training.log import TrainingDiverged

    job = join_processes(args)
    with raise_together() if job else contextlib.nullcontext():
        experiment = positional(args, "ghm-jax train EXPERIMENT")
        default = load_experiment(experiment) if experiment else Config()
        arguments = parse(Train, args, "ghm-jax train", Train(experiment or "", config=default))
        config = arguments.config
        run_dir = arguments.run_dir or f"runs/{experiment_name(arguments.experiment)}"
        profile = steps_to_profile(arguments.profile)
        start_devices(config, joined=job)
    try:
        with hurried_exit(job):
            train(config, run_dir, restart=arguments.restart, profile=profile, progress=Bar())
    except TrainingDiverged as error:
        fail(str(error) if is_first() else None)
    except CheckpointFailed as error:
        fail(str(error))
    except TrainingInterrupted as error:
        if is_first():
            again = " ".join(["ghm-jax train", *(a for a in args if a != "--restart")])
            again = "the same commands" if job else again
            print(f"ghm-jax: {error}; go on with: {again}", file=sys.stderr)
        sys.exit(0 if error.preempted else 130)
    if is_first():
        print(f"{run_dir}: done; score it with: ghm-jax evaluate {run_dir}")


def steps_to_profile(text: str) -> tuple[int, int] | None:
    """The first and the last step of `N:M`; None of nothing."""
    if not text:
        return None
    first, separator, last = text.partition(":")
    if not (separator and first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--profile: {text!r} is not N:M; give two steps, such as 10:12")
    return int(first), int(last)


@dataclass
class Evaluate:
    """Scores the newest checkpoint of a run: metrics.json, detections.json, report.html."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run (with --detections also an experiment)."""
    split: str = ""
    """Split to evaluate on (the run's validation split)."""
    annotations: str = ""
    """Official COCO file of that split (the run's). One without annotations, such as
    image_info_test-dev2017.json, gives a results file for COCO's server instead of figures."""
    detections: str = ""
    """Score these detections (COCO results JSON) instead of the run's, and write nothing ..."""
    out: str = ""
    """... unless it is into this new directory: metrics.json, errors.json, report.html."""
    evaluator: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """hotcoco, or pycocotools (slower, the same figures)."""
    distributed: Distributed = field(default_factory=Distributed)


def evaluate_command(args: list[str]) -> None:
    """`ghm-jax evaluate`."""
    from ghm_jax.distributed.processes import is_first, raise_together
    from ghm_jax.progress import Bar

    job = join_processes(args)
    with raise_together() if job else contextlib.nullcontext():
        directory = positional(args, "ghm-jax evaluate RUN")
        a = parse(Evaluate, args, "ghm-jax evaluate", Evaluate(directory or ""))
        if a.out and not a.detections:
            raise ConfigError(
                "--out: is for --detections; what a run finds goes into its directory"
            )
        if job and a.detections:
            raise ConfigError("--detections: needs no network; score them in one process")
        if not a.detections:
            _, config = load_run(a.run)
            start_devices(config, joined=job)

    from ghm_jax.evaluate import evaluate, evaluate_file
    from ghm_jax.evaluation.results import Submission

    data = {"split": a.split or None, "annotations": a.annotations or None}
    if a.detections:
        out = a.out or None
        _print_figures(evaluate_file(a.run, a.detections, out, evaluator=a.evaluator, **data))
        if out:
            print(f"report: {RunDirectory(Path(out)).report}")
        return
    with hurried_exit(job):
        result = evaluate(a.run, evaluator=a.evaluator, progress=Bar(), **data)
    if not is_first():
        return
    if isinstance(result, Submission):
        print(f"{result.path}: written, {result.images} images, for COCO's server")
        return
    _print_figures(result)
    print(f"report: {RunDirectory(Path(a.run)).report}")


def _print_figures(result: "Evaluation") -> None:
    """The twelve figures with what they mean, and AP by class in columns."""
    from ghm_jax.runs.metrics import METRICS

    for name, meaning in METRICS.items():
        print(f"  {name:<6} {_percent(result.metrics[name]):>6}  {meaning}")
    print("by class (AP):")
    cells = [f"  {_percent(ap):>5} {name}" for name, ap in result.per_class.items()]
    columns = 4 if len(cells) > 12 else 1
    width = max(map(len, cells)) + 1
    for start in range(0, len(cells), columns):
        print("".join(f"{cell:<{width}}" for cell in cells[start : start + columns]).rstrip())


@dataclass
class Import:
    """Makes a run of a published detector, to evaluate, export or train further."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """RetinaNet of torchvision or mmdetection: .safetensors, .pth, or hf://OWNER/NAME[/FILE]."""
    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config` of the same network."""
    run_dir: str = ""
    """Where the run goes (runs/ and the name of the weights)."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def import_command(args: list[str]) -> None:
    """`ghm-jax import`."""
    from ghm_jax.import_weights import import_run

    usage = "ghm-jax import WEIGHTS EXPERIMENT"
    weights = positional(args, usage)
    experiment = weights and positional(args[1:], usage)
    default = load_experiment(experiment) if experiment else Config()
    given = Import(weights or "", experiment or "", config=default)
    arguments = parse(Import, args, "ghm-jax import", given)
    run_dir = arguments.run_dir or f"runs/{Path(arguments.weights).stem}"
    import_run(arguments.weights, arguments.config, run_dir)
    print(f"{run_dir}: ready; score it with: ghm-jax evaluate {run_dir}")


@dataclass
class Export:
    """Writes the newest checkpoint of a run for other programs."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    out: str
    """File to write; .safetensors: weights in torchvision's names; .stablehlo: the detector as a
    program that needs JAX only, with a JSON file that says how to call it."""
    batch_size: int | None = None
    """.stablehlo: images a call (1)."""
    size: tuple[int, int] | None = None
    """.stablehlo: height and width of the images, multiples of 32 (the run's first bucket)."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] | None = None
    """.stablehlo: where it can run (everywhere)."""


def export_command(args: list[str]) -> None:
    """`ghm-jax export`."""
    directory = positional(args, "ghm-jax export RUN --out FILE")
    a = parse(Export, args, "ghm-jax export", Export(directory or "", tyro.MISSING))

    from ghm_jax.export import export
    from ghm_jax.progress import Bar

    shape = {"batch_size": a.batch_size, "size": a.size, "platforms": a.platforms}
    for path in export(a.run, a.out, progress=Bar(), **shape):
        print(f"{path}: written")


@dataclass
class Describe:
    """What the detector of an experiment costs: parameters, multiply-adds, anchors of an image."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`, or FILE:ROW for one of its `configs`."""
    size: tuple[int, int] = (800, 1280)
    """Height and width of the image in pixels."""
    classes: int = 0
    """Number of classes (that of the data set)."""
    config: AllSettings = field(default_factory=Config)


def describe_command(args: list[str]) -> None:
    """`ghm-jax describe`."""
    import jax

    from ghm_jax.analysis.cost import describe
    from ghm_jax.cli.tables import description_table

    experiment = positional(args, "ghm-jax describe EXPERIMENT")
    default = load_experiment(experiment) if experiment else Config()
    arguments = parse(
        Describe, args, "ghm-jax describe", Describe(experiment or "", config=default)
    )
    config = arguments.config.check()
    if min(arguments.size) < 1:
        raise ConfigError(f"--size: must be positive, got {arguments.size}")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    num_classes = arguments.classes or _num_classes(config.data)
    description = describe(config, num_classes, arguments.size)
    print(f"{config.model.backbone}, {description_table(description)}")


def _num_classes(data: Data) -> int:
    """Classes of a data set, without making one."""
    if data.classes:
        return len(data.classes)
    if data.name.startswith("coco/"):
        return 80
    if data.name and not (Path(data.dir) / data.name).is_dir():
        raise ConfigError(
            f"--classes: {data.name} is not in {data.dir}, so its number of classes is unknown; "
            "give it (--classes N) or set --data.dir"
        )
    from ghm_jax.data.dataset import open_dataset

    return len(open_dataset(data, data.train_split).class_names)


def start_devices(config: Config, *, joined: bool = False) -> None:
    """Checks what needs no devices, then lets JAX find them: an error comes in no time.

    Args:
        config: of the run.
        joined: whether this is one of several processes, whose devices are given.
    """
    config.check()

    from ghm_jax.distributed.devices import keep_programs, use_cpu_cores

    if not joined:
        use_cpu_cores((config.optimizer.batch_size, config.predict.batch_size))
    keep_programs(cache_directory("programs"))


def _percent(fraction: float) -> str:
    return "-" if fraction < 0 else f"{100 * fraction:.1f}"

"""The command `ghm-jax`: argv in, thin calls of the package, the only prints and exits.

    ghm-jax train experiments/quickstart.py [--run-dir DIR] [--loss.momentum 0.9 ...]
    ghm-jax evaluate runs/quickstart [--split validation] [--evaluator pycocotools]
    ghm-jax import WEIGHTS EXPERIMENT [--run-dir DIR] [--data.dir data ...]
    ghm-jax export runs/quickstart --out FILE.safetensors
    ghm-jax describe experiments/coco_r50_ghm.py [--size HEIGHT WIDTH] [--classes N]
    ghm-jax data prepare coco/2017 --source DIR --out data
    ghm-jax data prepare folder --name mine --out data --train IMAGES JSON --validation IMAGES JSON
    ghm-jax bench losses [--out FILE.json]

`ghm-jax train EXPERIMENT --help` lists every setting.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro

    from ghm_jax.config import Config, ConfigError, Data, flatten, unknown_key
    from ghm_jax.rundir import load_experiment, load_run
except ModuleNotFoundError as missing:
    sys.exit(
        f"ghm-jax: {missing}; the detector needs more than the losses: "
        'pip install "ghm-jax[detector]"'
    )


# Settings by their dotted names; a switch is given like any other: --model.remat True.
_AllSettings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


@dataclass
class Train:
    """Trains a detector, or goes on with a run that was stopped."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`."""
    run_dir: str = ""
    """Where the run goes (runs/ and the experiment's name)."""
    restart: bool = False
    """Move an existing run aside and start anew."""
    config: _AllSettings = field(default_factory=Config)


@dataclass
class Evaluate:
    """Scores the newest checkpoint of a run: metrics.json, detections.json, report.html."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    split: str = ""
    """Split to evaluate on (the run's validation split)."""
    evaluator: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """hotcoco, or pycocotools (slower, the same figures)."""


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


@dataclass
class Export:
    """Writes the newest checkpoint of a run for other programs."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    out: str
    """File to write; .safetensors: weights in torchvision's names."""


@dataclass
class Describe:
    """What the detector of an experiment costs: parameters, multiply-adds, anchors of an image."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    """File that defines `config`."""
    size: tuple[int, int] = (800, 1280)
    """Height and width of the image in pixels."""
    classes: int = 0
    """Number of classes (that of the data set)."""
    config: _AllSettings = field(default_factory=Config)


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


@dataclass
class PrepareCoco:
    """Turns the unpacked official COCO files into a data set to train on."""

    source: str
    """Directory with train2017/, val2017/ and annotations/ (or 2014)."""
    out: str = "data"
    """Directory of data sets (data.dir of a run)."""


@dataclass
class BenchLosses:
    """Times the losses, value and gradient, on one image's logits (9 anchors, 80 classes)."""

    sizes: tuple[tuple[int, int], ...] = ((640, 640), (800, 1344))
    """(height, width) of the images."""
    repeats: int = 7
    """Timed calls of each loss."""
    out: str = ""
    """JSON file to write the rows into."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 0, with 1 after a one-line error, or with 130 when stopped."""
    args = list(sys.argv[1:] if argv is None else argv)
    # JAX on a machine without accelerators explains at length why it found none.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command = next((n for n in (3, 2, 1) if " ".join(args[:n]) in _COMMANDS), 0)
    if not command:
        wanted = " ".join(a for a in args if a not in ("-h", "--help"))
        only_help = not args or args[-1] in ("-h", "--help")
        if not only_help or not any(f"{c} ".startswith(wanted) for c in _COMMANDS):
            _fail(f"unknown command {wanted!r}; choose from {', '.join(_COMMANDS)}")
        print(__doc__)
        return
    try:
        _COMMANDS[" ".join(args[:command])](args[command:])
    except (ConfigError, FileNotFoundError, PermissionError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("\nghm-jax: interrupted", file=sys.stderr)
        sys.exit(130)


def _train(args: list[str]) -> None:
    from ghm_jax.parallel import use_cpu_cores
    from ghm_jax.progress import Bar
    from ghm_jax.train import TrainingDiverged, TrainingInterrupted, train

    experiment = _positional(args, "ghm-jax train EXPERIMENT")
    default = load_experiment(experiment) if experiment else Config()
    arguments = _parse(Train, args, "ghm-jax train", Train(experiment or "", config=default))
    config = arguments.config
    run_dir = arguments.run_dir or f"runs/{Path(arguments.experiment).stem}"
    _start_devices(config, use_cpu_cores)
    try:
        train(config, run_dir, restart=arguments.restart, progress=Bar())
    except TrainingDiverged as error:
        _fail(str(error))
    except TrainingInterrupted as error:
        again = " ".join(["ghm-jax train", *(a for a in args if a != "--restart")])
        print(f"ghm-jax: {error}; go on with: {again}", file=sys.stderr)
        sys.exit(130)
    print(f"{run_dir}: done; score it with: ghm-jax evaluate {run_dir}")


def _evaluate(args: list[str]) -> None:
    from ghm_jax.parallel import use_cpu_cores
    from ghm_jax.progress import Bar

    directory = _positional(args, "ghm-jax evaluate RUN")
    arguments = _parse(Evaluate, args, "ghm-jax evaluate", Evaluate(directory or ""))
    run, config = load_run(arguments.run)
    _start_devices(config, use_cpu_cores)

    from ghm_jax.evaluate import METRICS, evaluate

    result = evaluate(
        arguments.run,
        split=arguments.split or None,
        evaluator=arguments.evaluator,
        progress=Bar(),
    )
    for name, meaning in METRICS.items():
        print(f"  {name:<6} {_percent(result[name]):>6}  {meaning}")
    print(f"report: {run.report}")


def _import(args: list[str]) -> None:
    from ghm_jax.weights import import_run

    usage = "ghm-jax import WEIGHTS EXPERIMENT"
    weights = _positional(args, usage)
    experiment = weights and _positional(args[1:], usage)
    default = load_experiment(experiment) if experiment else Config()
    given = Import(weights or "", experiment or "", config=default)
    arguments = _parse(Import, args, "ghm-jax import", given)
    run_dir = arguments.run_dir or f"runs/{Path(arguments.weights).stem}"
    import_run(arguments.weights, arguments.config, run_dir)
    print(f"{run_dir}: ready; score it with: ghm-jax evaluate {run_dir}")


def _export(args: list[str]) -> None:
    directory = _positional(args, "ghm-jax export RUN --out FILE")
    arguments = _parse(Export, args, "ghm-jax export", Export(directory or "", tyro.MISSING))

    from ghm_jax.export import export

    print(f"{export(arguments.run, arguments.out)}: written")


def _describe(args: list[str]) -> None:
    import jax

    from ghm_jax.describe import describe, table

    experiment = _positional(args, "ghm-jax describe EXPERIMENT")
    default = load_experiment(experiment) if experiment else Config()
    arguments = _parse(
        Describe, args, "ghm-jax describe", Describe(experiment or "", config=default)
    )
    config = arguments.config.check()
    if min(arguments.size) < 1:
        raise ConfigError(f"--size: must be positive, got {arguments.size}")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators alone
    num_classes = arguments.classes or _num_classes(config.data)
    print(f"{config.model.backbone}, {table(describe(config, num_classes, arguments.size))}")


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


def _prepare_folder(args: list[str]) -> None:
    from ghm_jax.data.coco_directory import prepare_folder

    a = _parse(PrepareFolder, args, "ghm-jax data prepare folder")
    splits = {"train": a.train} | ({"validation": a.validation} if a.validation else {})
    path = prepare_folder(a.name, a.out, splits)
    print(f"{path}: ready; train with: ghm-jax train experiments/folder.py --data.dir {a.out}")


def _prepare_coco(year: str) -> Callable[[list[str]], None]:
    def prepare(args: list[str]) -> None:
        from ghm_jax.data.coco_directory import prepare_folder

        a = _parse(PrepareCoco, args, f"ghm-jax data prepare coco/{year}")
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


def _bench_losses(args: list[str]) -> None:
    from ghm_jax.bench.losses import measure_losses

    a = _parse(BenchLosses, args, "ghm-jax bench losses")
    rows = measure_losses(a.sizes, a.repeats)
    print(
        f"{'image':>10}  {'value and gradient of':<36}{'ms':>9}{'x focal':>9}{'extra memory':>14}"
    )
    for row in rows:
        height, width = row.image_size
        memory = "-" if row.extra_memory is None else f"{row.extra_memory:.1f} x logits"
        print(
            f"{f'{height} x {width}':>10}  {row.loss:<36}{row.milliseconds:>9.1f}"
            f"{row.to_focal:>9.2f}{memory:>14}"
        )
    if a.out:
        _write_result(Path(a.out), args, [dataclasses.asdict(row) for row in rows])


def _write_result(path: Path, args: list[str], rows: list[dict[str, Any]]) -> None:
    """A measured table with what is needed to read it."""
    import jax

    device = jax.devices()[0]
    record = {
        "command": "ghm-jax bench " + " ".join(["losses", *args]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{device.platform} {device.device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "import": _import,
    "export": _export,
    "describe": _describe,
    "data prepare folder": _prepare_folder,
    "data prepare coco/2017": _prepare_coco("2017"),
    "data prepare coco/2014": _prepare_coco("2014"),
    "bench losses": _bench_losses,
}


def _start_devices(config: Config, use_cpu_cores: Callable[[tuple[int, ...]], None]) -> None:
    """Checks what needs no devices, then lets JAX find them: an error comes in no time."""
    config.check()
    use_cpu_cores((config.optimizer.batch_size, config.predict.batch_size))


def _positional(args: list[str], usage: str) -> str | None:
    """The first argument, which must come first; None when only help is wanted."""
    if args and not args[0].startswith("-"):
        return args[0]
    if "-h" in args or "--help" in args:
        return None
    raise ConfigError(f"usage: {usage} [options]; --help lists them")


def _parse(kind: type[Any], args: list[str], program: str, default: Any = None) -> Any:
    """The arguments as a `kind`, by tyro; its errors as one line."""
    for arg in args:
        key = arg.partition("=")[0][2:].replace("-", "_")
        if arg.startswith("--") and "." in key and key not in flatten(Config()):
            raise ConfigError(unknown_key(key))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=args, prog=program, default=default)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise ConfigError(_first_sentence(said.getvalue())) from None


def _first_sentence(boxed: str) -> str:
    """What a tyro error box says before its first rule, on one line."""
    lines = []
    for line in boxed.splitlines():
        text = line.strip(" │")
        if text.startswith(("╭", "╰")):
            continue
        if text.startswith("─"):
            break
        lines.append(text)
    return f"{' '.join(lines) or boxed.strip()} (--help lists all settings)"


def _percent(fraction: float) -> str:
    return "-" if fraction < 0 else f"{100 * fraction:.1f}"


def _fail(message: str) -> None:
    print(f"ghm-jax: {message}", file=sys.stderr)
    sys.exit(1)

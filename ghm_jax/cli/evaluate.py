"""`ghm-jax evaluate`."""

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ghm_jax.cli.arguments import Arguments, DataPlace, parse
from ghm_jax.cli.devices import start_devices
from ghm_jax.cli.job import Distributed, hurried_exit, join_processes
from ghm_jax.cli.messages import Bar, fail
from ghm_jax.exceptions import ArgumentError
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.storage import as_path

if TYPE_CHECKING:
    from ghm_jax.evaluation.results import Evaluation


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
    """... except into this new directory: metrics.json, errors.json, report.html."""
    evaluator: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """hotcoco, or pycocotools (slower, the same figures)."""
    data: DataPlace = field(default_factory=DataPlace)
    distributed: Distributed = field(default_factory=Distributed)


def evaluate_command(arguments: Arguments) -> None:
    """`ghm-jax evaluate`."""
    from ghm_jax.distributed.processes import is_first, raise_together

    job = join_processes(arguments)
    with raise_together() if job else contextlib.nullcontext():
        (directory,) = arguments.required(1, "ghm-jax evaluate RUN")
        a = parse(Evaluate, arguments, "ghm-jax evaluate", Evaluate(directory))
        if a.out and not a.detections:
            raise ArgumentError(
                "out",
                "is only for `detections`, because results of a run go into its directory",
                "omit it",
            )
        if job and a.detections:
            raise ArgumentError("detections", "needs no network", "score them in one process")
        if not a.detections:
            start_devices(load_run(a.run)[1], joined=job)

    from ghm_jax.evaluate import evaluate, evaluate_file
    from ghm_jax.evaluation.results import Submission

    data = {
        "split": a.split or None,
        "annotations": a.annotations or None,
        "data_dir": a.data.dir or None,
    }
    if a.detections:
        out = a.out or None
        _print_figures(evaluate_file(a.run, a.detections, out, evaluator=a.evaluator, **data))
        if out:
            print(f"report: {RunDirectory(as_path(out)).report}")
        return
    with hurried_exit(job), Bar() as bar:
        result = evaluate(a.run, evaluator=a.evaluator, progress=bar, **data)
    if not is_first():
        return
    if isinstance(result, Submission):
        print(f"{result.path}: written, {result.images} images, for COCO's server")
        return
    _print_figures(result)
    if result.unwritten:
        sys.stdout.flush()
        fail(f"{result.unwritten}; the files of {a.run} are not those of this evaluation")
    print(f"report: {RunDirectory(as_path(a.run)).report}")


def _print_figures(result: "Evaluation") -> None:
    """The twelve figures with their meaning, and AP by class in columns."""
    from ghm_jax.runs.metrics import METRICS

    for name, meaning in METRICS.items():
        print(f"  {name:<6} {_percent(result.metrics[name]):>6}  {meaning}")
    print("by class (AP):")
    cells = [f"  {_percent(ap):>5} {name}" for name, ap in result.per_class.items()]
    columns = 4 if len(cells) > 12 else 1
    width = max(map(len, cells)) + 1
    for start in range(0, len(cells), columns):
        print("".join(f"{cell:<{width}}" for cell in cells[start : start + columns]).rstrip())


def _percent(fraction: float) -> str:
    return "-" if fraction < 0 else f"{100 * fraction:.1f}"

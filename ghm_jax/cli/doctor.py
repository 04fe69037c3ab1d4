"""`ghm-jax doctor`."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from ghm_jax.cli.arguments import AllSettings, Arguments, check_positive, parse
from ghm_jax.cli.messages import as_options
from ghm_jax.config import Config
from ghm_jax.exceptions import UserError
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.storage import as_path, is_bucket

if TYPE_CHECKING:
    from ghm_jax.analysis.doctor import Finding


@dataclass
class Doctor:
    """Checks versions, devices, decoders, disk and data; prints each fault with its remedy."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_EXPERIMENT")] = ""
    """Run or experiment whose settings and data are checked, or gs://BUCKET/DIR to try a bucket
    (none)."""
    images: int = 2000
    """Most records to read per split."""
    config: AllSettings = field(default_factory=Config)


def doctor_command(arguments: Arguments) -> None:
    """`ghm-jax doctor`: exits with 1 if there is a fault."""
    from ghm_jax.analysis.doctor import examine, fault_of
    from ghm_jax.distributed.devices import use_cpu_cores

    a = parse(Doctor, arguments, "ghm-jax doctor", Doctor())
    check_positive(images=a.images)
    faults, source = 0, a.source
    if source:
        try:
            a = parse(
                Doctor, arguments, "ghm-jax doctor", Doctor(source, config=_config_of(source))
            )
        except UserError as error:
            print(_line(fault_of("settings", error)))
            faults, source = 1, ""
    use_cpu_cores((a.config.optimizer.batch_size, a.config.predict.batch_size))
    given = any(option.name == "data.dir" for option in arguments.options)
    shown = {"images": a.images, "encoding": getattr(sys.stdout, "encoding", None) or "utf-8"}
    for finding in examine(a.config, source, data_given=given, **shown):
        print(_line(finding), flush=True)
        faults += not finding.good
    if faults:
        print(f"{faults} {'fault' if faults == 1 else 'faults'}")
        sys.exit(1)
    print("all is well")


def _config_of(source: str) -> Config:
    """Of a run or an experiment; the default for a place in a bucket where no run is yet."""
    place = as_path(source)
    if is_bucket(place) and not RunDirectory(place).config.is_file():
        return Config()
    return load_run(source)[1] if place.is_dir() else load_experiment(source)


def _line(finding: "Finding") -> str:
    text = "; ".join(filter(None, (finding.says, finding.remedy)))
    return f"{'ok  ' if finding.good else 'BAD '}  {finding.what:<14}  {as_options(text)}"

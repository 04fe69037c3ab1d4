"""The command that looks for what is wrong."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ghm_jax.cli.arguments import AllSettings, parse
from ghm_jax.config import Config
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.directory import load_run
from ghm_jax.runs.experiments import load_experiment


@dataclass
class Doctor:
    """Looks at versions, devices, decoders, disk and data; each fault with its remedy."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_EXPERIMENT")] = ""
    """Run or experiment whose settings and data are looked at (none)."""
    images: int = 2000
    """Records of each split to read, at most."""
    config: AllSettings = field(default_factory=Config)


def doctor_command(args: list[str]) -> None:
    """`ghm-jax doctor`: exits with 1 when something is wrong."""
    from ghm_jax.analysis.doctor import examine
    from ghm_jax.distributed.devices import use_cpu_cores

    a = parse(Doctor, args, "ghm-jax doctor", Doctor())
    if a.images < 1:
        raise ConfigError(f"--images: must be positive, got {a.images}")
    faults, source = 0, a.source
    if source:
        try:
            default = load_run(source)[1] if Path(source).is_dir() else load_experiment(source)
            a = parse(Doctor, args, "ghm-jax doctor", Doctor(source, config=default))
        except ConfigError as error:
            print(_line(False, "settings", str(error), ""))
            faults, source = 1, ""
    use_cpu_cores((a.config.optimizer.batch_size, a.config.predict.batch_size))
    given = any(arg.partition("=")[0].replace("_", "-") == "--data.dir" for arg in args)
    for finding in examine(a.config, source, data_given=given, images=a.images):
        print(_line(finding.good, finding.what, finding.says, finding.remedy), flush=True)
        faults += not finding.good
    if faults:
        print(f"{faults} {'fault' if faults == 1 else 'faults'}")
        sys.exit(1)
    print("all is well")


def _line(good: bool, what: str, says: str, remedy: str) -> str:
    line = f"{'ok  ' if good else 'BAD '}  {what:<14}  {says}"
    return line + (f"; {remedy}" if remedy else "")

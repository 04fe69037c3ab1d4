"""A run's directory: what lies where, and whether a new start may use it.

runs/NAME/
    config.json      the resolved config
    checkpoints/     Orbax checkpoints by step
    metrics.jsonl    one record of training a line
    evaluations.jsonl  the COCO figures of one evaluation during training a line
    tensorboard/     the same for TensorBoard, with pictures of the evaluations
    wandb/, wandb_id  what Weights & Biases keeps, if it is used
    metrics.json     the COCO figures of the last evaluation
    detections.json  its detections in COCO results form
    errors.json      what is wrong with them
    report.html      all of it to look at
"""

import json
import os
import runpy
import time
from dataclasses import dataclass
from pathlib import Path

from ghm_jax.config import Config, ConfigError, differences, from_dict, to_dict


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside a run's directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether a state to go on from lies there."""
        return any(path.name.isdigit() for path in self.checkpoints.glob("*"))

    @property
    def history(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def detections(self) -> Path:
        return self.path / "detections.json"

    @property
    def errors(self) -> Path:
        return self.path / "errors.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def load_experiment(path: str | Path) -> Config:
    """The config of an experiment: FILE's `config`, or for FILE:ROW one of its `configs`.

    Raises:
        ConfigError: no such file or row, or the file does not define a `Config` there.
    """
    file, row = _split_experiment(path)
    if not Path(file).is_file():
        raise ConfigError(f"{file}: no such experiment file; see experiments/ for those there are")
    try:
        defined = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"{file}: {what}; mend the file") from error
    config, configs = defined.get("config"), defined.get("configs")
    if isinstance(configs, dict):
        choice = f"choose from {', '.join(f'{file}:{name}' for name in configs)}"
        if row:
            config = configs.get(row)
            if row not in configs:
                raise ConfigError(f"{path}: no row {row!r}; {choice}")
        elif config is None:
            raise ConfigError(f"{file}: holds several configs; {choice}")
    elif row:
        raise ConfigError(f"{path}: the file has no `configs` to choose from; give {file}")
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path}: defines no `config = Config(...)`; see experiments/quickstart.py"
        )
    return config


def experiment_name(path: str | Path) -> str:
    """What runs of an experiment are called: `table1-bins_30` for a/table1.py:bins_30."""
    file, row = _split_experiment(path)
    return "-".join(filter(None, [Path(file).stem, row]))


def _split_experiment(path: str | Path) -> tuple[str, str]:
    """FILE and ROW, which may be empty."""
    file, separator, row = str(path).rpartition(".py:")
    return (f"{file}.py", row) if separator else (str(path), "")


def load_run(path: str | Path) -> tuple[RunDirectory, Config]:
    """An existing run and its config.

    Raises:
        ConfigError: the directory is no run, or its config cannot be read.
    """
    run = RunDirectory(Path(path))
    if not run.config.is_file():
        raise ConfigError(f"{path}: not a run (no config.json in it); give the directory of a run")
    try:
        values = json.loads(run.config.read_text())
        if not isinstance(values, dict):
            raise ValueError("holds no settings")
        return run, from_dict(values)
    except ValueError as error:
        raise ConfigError(f"{run.config}: {error}") from error


def claim_run(path: str | Path, config: Config) -> RunDirectory:
    """The directory for a run of `config`: a new one, or one to go on in.

    Args:
        path: of the run.
        config: resolved.

    Raises:
        ConfigError: something else lies there, or a run of another config.
    """
    run = RunDirectory(Path(path))
    if run.config.is_file():
        changed = differences(load_run(path)[1], config)
        if changed:
            key, (old, new) = next(iter(changed.items()))
            others = f" (and {', '.join(list(changed)[1:])})" if len(changed) > 1 else ""
            raise ConfigError(
                f"{path}: was started with {key} {old!r}, not {new!r}{others}; "
                "choose another --run-dir, or --restart to move it aside and start anew"
            )
    elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise ConfigError(f"{path}: exists and is not a run; choose another --run-dir")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.config, json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); choose another --run-dir"
        ) from error
    return run


def unused_directory(path: str | Path) -> Path:
    """A directory for output that does not exist or is empty, so that nothing is written over.

    Raises:
        ConfigError: it is in use.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--out: {path} is not empty; choose a new directory")
    return path


def set_aside(path: Path) -> Path:
    """Renames an old run, so that nothing is lost; returns its new path."""
    stem = f"{path.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"
    new, number = path.with_name(stem), 2
    while new.exists():
        new, number = path.with_name(f"{stem}-{number}"), number + 1
    return path.rename(new)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one: a crash between never tears it."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def cache_directory(kind: str) -> Path:
    """Where to keep what can be made again: under $GHM_JAX_CACHE, or ~/.cache/ghm_jax."""
    return Path(os.environ.get("GHM_JAX_CACHE") or Path.home() / ".cache/ghm_jax") / kind

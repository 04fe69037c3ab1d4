"""A run's directory: which file is where, and whether a run may use the directory.

runs/NAME/
    config.json      the resolved config
    checkpoints/     Orbax checkpoints by step
    metrics.jsonl    training metrics, one record per line
    evaluations.jsonl  COCO figures of the evaluations during training, one per line
    tensorboard/     the same for TensorBoard, with pictures of the evaluations
    wandb/, wandb_id  what Weights & Biases keeps, if it is used
    metrics.json     COCO figures of the last evaluation
    detections.json  its detections in COCO results form
    errors.json      analysis of its errors
    report.html      all of it as one page
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ghm_jax.config import Config, differences, from_dict, to_dict
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.storage import write_text


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
        """Whether there is a state to resume from."""
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


def load_run(path: str | Path) -> tuple[RunDirectory, Config]:
    """An existing run and its config.

    Raises:
        ConfigError: the directory is not a run, or its config cannot be read.
    """
    run = RunDirectory(Path(path))
    if not run.config.is_file():
        raise ConfigError(
            str(path), "not a run (it has no config.json)", "give the directory of a run"
        )
    try:
        values = json.loads(run.config.read_text())
        if not isinstance(values, dict):
            raise ValueError("holds no settings")
        return run, from_dict(values)
    except ValueError as error:
        raise ConfigError(str(run.config), str(error)) from error


def claim_run(path: str | Path, config: Config) -> RunDirectory:
    """The directory for a run of `config`: a new one, or one whose run is resumed.

    Args:
        path: of the run.
        config: resolved.

    Raises:
        ConfigError: it holds something else, or a run of another config.
    """
    run = RunDirectory(Path(path))
    if run.config.is_file():
        changed = differences(load_run(path)[1], config)
        if changed:
            key, (old, new) = next(iter(changed.items()))
            others = f" (and {', '.join(list(changed)[1:])})" if len(changed) > 1 else ""
            raise ConfigError(
                str(path),
                f"was started with {key} {old!r}, not {new!r}{others}",
                "choose another `run_dir`, or `restart` to move it aside and train from scratch",
            )
    elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise ConfigError(str(path), "exists and is not a run", "choose another `run_dir`")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.config, json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be written ({error.strerror})", "choose another `run_dir`"
        ) from error
    return run

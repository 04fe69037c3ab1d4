"""A run's directory: which file is where, and whether a run may use the directory.

It is on a disk or in a bucket, gs://BUCKET/runs/NAME; see `ghm_jax.storage`.

runs/NAME/
    config.json      the resolved config
    dataset.json     the data set as it was when the run started or resumed last
    training.lock    of the job that trains the run, while it does
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

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ghm_jax.config import Config, differences, from_dict, to_dict
from ghm_jax.exceptions import ConfigError
from ghm_jax.json_text import parse_json, shown
from ghm_jax.runs.checkpoint import check_location, complete_steps
from ghm_jax.runs.lock import LOCK, lock_directory
from ghm_jax.storage import as_path, set_aside, write_text


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside a run's directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def dataset(self) -> Path:
        return self.path / "dataset.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to resume from."""
        return bool(complete_steps(self.checkpoints))

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


def load_run(path: str | Path, *, data_dir: str | None = None) -> tuple[RunDirectory, Config]:
    """An existing run and its config.

    Args:
        path: of the run.
        data_dir: where its data is now; None: where it was.

    Raises:
        ConfigError: the directory is not a run, or its config cannot be read.
    """
    run = RunDirectory(as_path(path))
    if not run.config.is_file():
        raise ConfigError(
            str(path), "not a run (it has no config.json)", "give the directory of a run"
        )
    try:
        values = parse_json(run.config.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("holds no settings")
        config = from_dict(values)
    except OSError as error:
        raise ConfigError(str(run.config), f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(str(run.config), str(error)) from error
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    return run, config


@contextlib.contextmanager
def claim_run(
    path: str | Path,
    config: Config,
    *,
    restart: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[RunDirectory]:
    """The directory for a run of `config`, for this job alone: a new one, or one to resume.

    Args:
        path: of the run.
        config: resolved.
        restart: move what is there aside first.
        say: called with each line about what was moved or taken over.

    Raises:
        ConfigError: it holds something else, or a run of another config, another job trains there,
            or checkpoints cannot be kept there.
    """
    run = RunDirectory(as_path(path))
    check_location(run.path)
    with contextlib.ExitStack() as held:
        try:
            if restart and run.path.exists():
                _move_aside(run.path, say)
            _check_unused(run, config)
            run.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_directory(run.path, say))
            write_text(run.config, json.dumps(to_dict(config), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                str(path), f"cannot be written ({error.strerror})", "choose another `run_dir`"
            ) from error
        yield run


def _move_aside(path: Path, say: Callable[[str], None]) -> None:
    with lock_directory(path, say) if path.is_dir() else contextlib.nullcontext() as lock:
        new = set_aside(path)
        if lock is not None:
            lock.file = new / lock.file.name
    say(f"moved the old run to {new}")


def _check_unused(run: RunDirectory, config: Config) -> None:
    """Raises ConfigError if a directory holds something else than a run of this config."""
    if run.config.is_file():
        changed = differences(load_run(run.path)[1], config)
        if changed:
            key, (old, new) = next(iter(changed.items()))
            others = f" (and {', '.join(list(changed)[1:])})" if len(changed) > 1 else ""
            raise ConfigError(
                str(run.path),
                f"was started with {key} {old!r}, not {new!r}{others}",
                "choose another `run_dir`, or `restart` to move it aside and train from scratch",
            )
    elif run.path.exists() and not _is_free(run.path):
        raise ConfigError(str(run.path), "exists and is not a run", "choose another `run_dir`")


def _is_free(path: Path) -> bool:
    """Whether it is a directory with nothing but the lock of a job that starts or was killed."""
    return path.is_dir() and all(file.name.startswith(LOCK) for file in path.iterdir())


def note_dataset(run: RunDirectory, images: int, checksum: str) -> str:
    """Notes the data set that a run is trained on from here.

    Args:
        run: whose directory this job has claimed.
        images: of the training split.
        checksum: changes whenever the data set is prepared again from other files.

    Returns:
        A warning if the run was trained on another one before; else empty.
    """
    changed = dataset_change(run, images, checksum)
    write_text(run.dataset, json.dumps({"images": images, "checksum": checksum}) + "\n")
    if not changed:
        return ""
    return (
        f"warning: {run.path}: {changed}; training continues on what is there now, `restart` "
        "trains from scratch"
    )


def dataset_change(run: RunDirectory, images: int, checksum: str) -> str:
    """Whether a run was trained on another data set than this one; empty: no, or not known.

    Args:
        run: with the note of `note_dataset`, if it was ever trained.
        images, checksum: as for `note_dataset`.
    """
    try:
        before = parse_json(run.dataset.read_bytes())
    except (OSError, ValueError):
        return ""
    if not isinstance(before, dict) or before == {"images": images, "checksum": checksum}:
        return ""
    return (
        "the data set was prepared again, from other files, since the run started "
        f"({shown(before.get('images'))} images then, {images} now)"
    )

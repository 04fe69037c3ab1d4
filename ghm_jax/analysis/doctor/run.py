"""Checks a run: its directory, its lock, its checkpoints, its data set and its weights."""

from collections.abc import Iterator
from pathlib import Path

from ghm_jax.analysis.doctor.finding import Finding, fault_of
from ghm_jax.config import Config
from ghm_jax.data.dataset import data_set_names, open_dataset
from ghm_jax.distributed.devices import choose_devices, own_devices
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.exceptions import ConfigError
from ghm_jax.models.weight_files import HUB
from ghm_jax.runs.checkpoint import check_location
from ghm_jax.runs.directory import RunDirectory, dataset_change
from ghm_jax.runs.lock import describe_lock
from ghm_jax.storage import as_path, why_not_writable
from ghm_jax.training.build import build
from ghm_jax.training.pretrained import read_backbone


def examine_directory(path: Path, config: Config) -> Iterator[Finding]:
    """Findings about the directory of a run."""
    run = RunDirectory(path)
    try:
        check_location(run.path)
    except ConfigError as error:
        yield Finding("run", False, f"{error.key}: {error.problem}", "rename the directory")
        return
    in_use, lock = describe_lock(run.path)
    if lock:
        yield Finding("lock", True, f"{run.path}: {lock}")
    if why := why_not_writable(run.detections, run.metrics, run.errors, run.report):
        said = f"{run.path}: evaluation cannot write its results ({why})"
        yield Finding("run", False, said, "make it writable, or copy the run")
    if in_use and run.has_checkpoint:  # its job removes checkpoints at any moment
        yield Finding("checkpoint", True, f"{run.path}: has a checkpoint")
    else:
        yield from _checkpoint(run, config)
    yield from _data_set(run, config)


def _checkpoint(run: RunDirectory, config: Config) -> Iterator[Finding]:
    """Whether the newest checkpoint can be read and fits the network of the config."""
    if not run.has_checkpoint:
        yield Finding("checkpoint", False, f"{run.path}: no checkpoint", "train the run first")
        return
    damaged: list[tuple[int, str]] = []
    device = own_devices(choose_devices(0))[0]
    try:
        state = restore_state(
            run, config, device, skipped=lambda step, why: damaged.append((step, why))
        )
    except ConfigError as error:
        yield fault_of("checkpoint", error)
        return
    for step, why in damaged:
        yield Finding(
            "checkpoint",
            False,
            f"{run.path}: the checkpoint of step {step} is damaged ({why})",
            f"step {int(state.step)} is used instead; delete it, or resume training",
        )
    yield Finding("checkpoint", True, f"{run.path}: has a checkpoint of step {int(state.step)}")


def _data_set(run: RunDirectory, config: Config) -> Iterator[Finding]:
    """Whether the data set is the one that the run was trained on."""
    if config.data.name not in data_set_names(as_path(config.data.dir)):  # do not build it
        return
    try:
        dataset = open_dataset(config.data, config.data.train_split)
    except ConfigError:  # which the checks of data report
        return
    if changed := dataset_change(run, len(dataset), dataset.checksum):
        remedy = "train from scratch with `restart`, or set `data.dir` to the former data set"
        yield Finding("run", False, f"{run.path}: {changed}", remedy)


def examine_weights(config: Config) -> Iterator[Finding]:
    """Findings about `model.weights`, from which a new run would start; nothing is downloaded."""
    source = config.model.weights
    if not source:
        return
    if source.startswith(HUB):
        yield Finding("weights", True, f"{source}: not checked, it would be downloaded")
        return
    blank = build(config, max(1, len(config.data.classes))).abstract_state
    like = {"params": blank.params, "batch_stats": blank.batch_stats}
    like = {kind: {"backbone": tree["backbone"]} for kind, tree in like.items()}
    read_backbone(config.model, Path(source), like)
    yield Finding("weights", True, f"{source}: fits {config.model.backbone}")

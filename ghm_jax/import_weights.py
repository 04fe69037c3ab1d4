"""Turns published weights of a complete detector into a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from ghm_jax.config import Config, Data
from ghm_jax.data.dataset import data_set_names, open_dataset
from ghm_jax.data.schema import COCO_CATEGORIES
from ghm_jax.distributed.devices import choose_devices
from ghm_jax.exceptions import ConfigError
from ghm_jax.models.weight_conversion import class_names_of, class_rows_of, import_detector
from ghm_jax.models.weight_files import load_weights, locate
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.checkpoint import Checkpoints
from ghm_jax.runs.directory import RunDirectory, claim_run
from ghm_jax.storage import as_path
from ghm_jax.training.build import build


def import_run(
    source: str, config: Config, run_dir: str | Path, *, progress: Progress | None = None
) -> RunDirectory:
    """Makes a run of a published detector: `config` and the weights as the state before step 1.

    It is a run like any other: it can be evaluated, exported, and trained further.

    Args:
        source: weights of a complete detector.
        config: of the same network; its data set gives the classes, and must be prepared unless it
            is COCO, whose classes are known.
        run_dir: where the run goes.
        progress: is told how classes were matched, where it was not name by name in one order.

    Raises:
        ConfigError: the weights cannot be read or do not fit, they are of other classes, or the
            directory is in use. Nothing is left behind then.
    """
    config.check()
    choose_devices(1)  # raises where there is none
    config = replace(config, data=_resolved(config.data))
    if RunDirectory(as_path(run_dir)).has_checkpoint:
        raise ConfigError(str(run_dir), "already holds a checkpoint", "choose another `run_dir`")

    path = locate(source)
    tensors, classes = load_weights(path)
    trainer = build(config, len(config.data.classes))
    blank = trainer.abstract_state
    try:
        names = class_names_of(classes)
        rows = class_rows_of(tensors, config.data.classes, COCO_CATEGORIES, names)
        like = {"params": blank.params, "batch_stats": blank.batch_stats}
        variables = import_detector(tensors, like, rows)
    except ValueError as error:
        raise ConfigError(str(path), str(error)) from error

    line = _matching(config.data.classes, rows, names)
    if line:
        (progress or Silent()).say(f"{path}: {line}")
    state = jax.jit(trainer.init_state)(variables)
    with (
        claim_run(run_dir, config) as run,
        Checkpoints(run.checkpoints, config.run.keep) as checkpoints,
    ):
        checkpoints.save(0, state)
        checkpoints.wait()
    return run


def _matching(
    classes: Sequence[str], rows: Sequence[int], names: Sequence[str] | None, most: int = 5
) -> str:
    """What a person should know of how classes found their weights; empty if nothing."""
    if list(classes) == list(names or ()):
        return ""
    pairs = [f"{name} from {row}" for name, row in zip(classes, rows, strict=True)]
    more = f" and {len(pairs) - most} more" if len(pairs) > most else ""
    how = "classes matched by name" if names else "holds no class names; classes matched by index"
    return f"{how} (from 0): {', '.join(pairs[:most])}{more}"


def _resolved(data: Data) -> Data:
    """With the data set's name and classes. COCO need not be prepared, so that users can predict on
    their own images."""
    if data.name in ("coco/2014", "coco/2017") and data.name not in data_set_names(
        as_path(data.dir)
    ):
        return replace(data, classes=tuple(COCO_CATEGORIES))
    dataset = open_dataset(data, data.validation_split)
    return replace(data, name=dataset.name, classes=dataset.class_names)

"""A run's network as a function from batches to detections, and detections in COCO's form."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ghm_jax.batch import LoadedBatch
from ghm_jax.config import Config, Data
from ghm_jax.data.dataset import Dataset, data_set_names, describe_dataset
from ghm_jax.data.loader import validation_batches
from ghm_jax.data.placement import to_original
from ghm_jax.data.schema import category_ids_of
from ghm_jax.detection.nms import Detections
from ghm_jax.detection.outputs import predict_step
from ghm_jax.distributed.devices import Device, merge_batch, num_local, parallelize, split_batch
from ghm_jax.distributed.processes import gather_rows
from ghm_jax.exceptions import ConfigError
from ghm_jax.progress import Progress
from ghm_jax.runs.checkpoint import Checkpoints
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.storage import as_path
from ghm_jax.training.build import build, make_model
from ghm_jax.training.state import TrainState


class Detector:
    """The network and the suppression of a config over devices, compiled once per bucket."""

    def __init__(self, config: Config, num_classes: int, devices: Sequence[Device]) -> None:
        """Computes nothing yet; the batch size must be a multiple of the number of devices."""
        self._replicas = num_local(list(devices))
        model = make_model(config, num_classes)
        step = functools.partial(predict_step, config=config, model=model)
        self._step = parallelize(step, list(devices), config.run.wrapper, split_output=True)

    def __call__(self, variables: dict[str, Any], loaded: LoadedBatch) -> Detections:
        """Detections [B, D] in NumPy, with boxes in pixels of the stored images.

        Args:
            variables: `params` and `batch_stats`.
            loaded: of `ghm_jax.data.batching.collate`.
        """
        inputs = split_batch(loaded.batch.model_inputs(), self._replicas)
        found = merge_batch(self._step(variables, inputs))
        return found._replace(boxes=to_original(found.boxes, loaded.scale, loaded.offset))


def detect(
    detector: Detector,
    config: Config,
    dataset: Dataset,
    variables: dict[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Detections of every image of a data set, once, in COCO results form.

    Each of several processes takes its share of the images, and all receive all detections. Boxes
    are in pixels of the stored images, categories the original ids.
    """
    results, seen = [], []
    batches = validation_batches(dataset, config, jax.process_index(), jax.process_count())
    for loaded in batches:
        found = detector(variables, loaded)
        for i in np.flatnonzero(loaded.valid):
            seen.append(int(loaded.batch.image_id[i]))
            of_image = Detections(*(array[i] for array in found))
            results += coco_results(seen[-1], of_image, dataset.category_ids)
        of_all = min(len(seen) * jax.process_count(), len(dataset))
        progress.update("evaluate", of_all, len(dataset), {})
    results, seen = gather_rows(results), gather_rows(seen)
    if len(seen) != len(dataset) or len(set(seen)) != len(seen):
        raise AssertionError(f"{len(set(seen))} of {len(dataset)} images were evaluated once")
    return results


def coco_results(
    image_id: int, found: Detections, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections of one image in COCO results form, without unused rows.

    Args:
        image_id: of the image.
        found: of the image, [D], boxes in its pixels.
        category_ids: COCO id of each label.
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(x, 3) for x in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(score, 5),
        }
        for (x0, y0, x1, y1), score, label in zip(
            *(np.asarray(array).tolist() for array in found), strict=True
        )
        if label >= 0
    ]


def restore_state(
    run: RunDirectory,
    config: Config,
    device: Device,
    *,
    skipped: Callable[[int, str], None] = lambda step, why: None,
) -> TrainState:
    """The state in a run's newest checkpoint that can be read, on one device.

    Args:
        run: with its checkpoints.
        config: of the run.
        device: for the state.
        skipped: called with the step and the reason for every damaged checkpoint that is newer.

    Raises:
        ConfigError: there is none that can be read.
    """
    if not run.checkpoints.is_dir():
        raise ConfigError(str(run.path), "no checkpoint yet", "train the run first")
    place = jax.sharding.SingleDeviceSharding(device)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        build(config, len(config.data.classes)).abstract_state,
    )
    with Checkpoints(run.checkpoints) as checkpoints:
        return checkpoints.restore(like, skipped=skipped)


def category_ids_of_run(data: Data, progress: Progress) -> tuple[int, ...]:
    """Category id of each label: those of the run's data set if it is available, since a run
    stores only the names.

    Args:
        data: of the run's config.
        progress: receives a message if the ids are derived from the names.
    """
    # Asked for by name, because opening the embedded data set would build it.
    if data.name in data_set_names(as_path(data.dir)):
        dataset = describe_dataset(data, progress)
        if dataset.class_names == data.classes:
            return dataset.category_ids
    progress.say(
        f"category ids are derived from class names (COCO's, or else from 1): no {data.name!r} "
        f"with the classes of the run in {data.dir}"
    )
    return category_ids_of(data.classes)

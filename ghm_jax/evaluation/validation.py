"""Evaluation on the validation split during training."""

import numpy as np

from ghm_jax.config import Config
from ghm_jax.data.dataset import open_dataset
from ghm_jax.distributed.devices import Device
from ghm_jax.distributed.processes import on_first_process
from ghm_jax.evaluation.coco import load_ground_truth, match_images, score
from ghm_jax.evaluation.detector import Detector, detect
from ghm_jax.evaluation.samples import make_samples
from ghm_jax.exceptions import ConfigError
from ghm_jax.plots.drawing import sample_grid
from ghm_jax.progress import Progress
from ghm_jax.training.state import TrainState

_PICTURES = 4  # validation images drawn at each evaluation


class Validation:
    """Scores states on the validation split; the detector is compiled once."""

    def __init__(self, config: Config, devices: list[Device], progress: Progress) -> None:
        """Opens the data set; raises ConfigError if that fails."""
        self._config = config
        self._dataset = open_dataset(config.data, config.data.validation_split, progress)
        self._truth = load_ground_truth(config, self._dataset)
        if "annotations" not in self._truth:
            raise ConfigError("data.annotations", "has no annotations", "give the instances JSON")
        if config.data.annotations:
            ids = [int(record["image/id"]) for record in self._dataset.source]
            part = "[" in config.data.validation_split
            self._truth = match_images(self._truth, ids, part=part)
        self._detector = Detector(config, len(self._dataset.class_names), devices)

    def score(
        self, state: TrainState, progress: Progress
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The twelve COCO figures by name, and pictures of the first images with their boxes and
        detections, uint8[H, W, 3] by name."""
        dataset = self._dataset
        detections = detect(self._detector, self._config, dataset, state.variables, progress)
        samples = make_samples(dataset, self._truth, detections, _PICTURES)
        pictures = {
            f"image_{sample.image_id}": sample_grid([sample], dataset.class_names)
            for sample in samples
        }
        return on_first_process(lambda: score(self._truth, detections)[0]), pictures

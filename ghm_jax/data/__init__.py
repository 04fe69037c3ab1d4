"""Data sets, and the batches that the train and evaluation steps take. No JAX in here."""

from ghm_jax.data.dataset import Dataset, open_dataset
from ghm_jax.data.ground_truth import coco_ground_truth
from ghm_jax.data.loader import train_batches, validation_batches
from ghm_jax.data.prepare.coco_folder import CocoDirectory, prepare_folder
from ghm_jax.data.prepare.coco_official import prepare_coco
from ghm_jax.data.prepare.digit_scenes import DigitScenes

__all__ = [
    "CocoDirectory",
    "Dataset",
    "DigitScenes",
    "coco_ground_truth",
    "open_dataset",
    "prepare_coco",
    "prepare_folder",
    "train_batches",
    "validation_batches",
]

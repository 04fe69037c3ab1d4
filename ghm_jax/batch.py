"""Types of what a step reads: NumPy arrays on the host, JAX arrays inside the step."""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""np.ndarray or jax.Array. Worker processes that decode images import this file but never JAX."""

NO_CLASS = -1
"""Label of a box that no anchor learns: padding, or a crowd region."""


class GroundTruth(NamedTuple):
    """The annotated boxes of B images, M of each."""

    boxes: Array
    """f32[B, M, 4], x0, y0, x1, y1 in pixels of the padded image; 0 = padding."""
    labels: Array
    """i32[B, M], class indices; NO_CLASS for padding and crowd regions."""
    is_crowd: Array
    """bool[B, M], the box is a crowd region."""


class ModelInputs(NamedTuple):
    """What the network reads."""

    images: Array
    """u8[B, H, W, 3], RGB, padded at the bottom and the right."""
    image_size: Array
    """i32[B, 2], (height, width) of each image without its padding."""

    @property
    def padded_size(self) -> tuple[int, int]:
        """(height, width) of the images with their padding."""
        return self.images.shape[1], self.images.shape[2]


class Batch(NamedTuple):
    """What a training step takes."""

    images: Array
    """As of `ModelInputs`."""
    image_size: Array
    """As of `ModelInputs`."""
    image_id: Array
    """i32[B]; -1 = filler."""
    truth: GroundTruth

    def model_inputs(self) -> ModelInputs:
        """What the network reads."""
        return ModelInputs(self.images, self.image_size)


class LoadedBatch(NamedTuple):
    """A batch, and what the host needs to know about its images."""

    batch: Batch
    scale: np.ndarray
    """f32[B, 2] (x, y), from stored to padded pixels; see `ghm_jax.data.placement`."""
    offset: np.ndarray
    """f32[B, 2] (x, y), added after scaling."""
    valid: np.ndarray
    """bool[B]; False: filler."""
    dropped_boxes: np.ndarray
    """i32[B], boxes dropped because there were more than M."""
    replaced: np.ndarray
    """bool[B], replaces an image that cannot be decoded."""

"""From a batch to the network's outputs, their targets and the detections."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ghm_jax.batch import Batch, ModelInputs
from ghm_jax.config import Config
from ghm_jax.detection.anchors import make_anchors
from ghm_jax.detection.levels import Levels, join_levels
from ghm_jax.detection.matching import IGNORE, Targets, match_anchors, num_used
from ghm_jax.detection.nms import Detections, select_detections
from ghm_jax.models import RetinaNet

# ImageNet's channel means and standard deviations in 0..255, as in torchvision and mmdetection.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


def normalize(images: jax.Array, image_size: jax.Array) -> jax.Array:
    """The network's input f32[b, H, W, 3]: mean 0 and standard deviation 1 over ImageNet.

    Padding becomes 0, the mean color, as imported weights expect it: other pipelines normalize
    before they pad.

    Args:
        images: u8[b, H, W, 3], RGB.
        image_size: i32[b, 2], (height, width) of each image inside its padding.
    """
    height, width = images.shape[1:3]
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (_MEAN, _STD))
    values = (images.astype(jnp.float32) - mean) / std
    rows = jnp.arange(height, dtype=image_size.dtype)[None, :] < image_size[:, :1]  # [b, H]
    columns = jnp.arange(width, dtype=image_size.dtype)[None, :] < image_size[:, 1:]  # [b, W]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], values, 0.0)


Outputs = tuple[Levels, Levels]
"""What the heads give: logits f32[b, A_l, K] and box deltas f32[b, A_l, 4] of each level."""


def apply_network(
    model: RetinaNet, params: Any, batch_stats: Any, inputs: ModelInputs, *, train: bool
) -> tuple[Outputs, Any]:
    """The network's outputs and the updated batch statistics."""
    with jax.named_scope("normalize"):
        images = normalize(inputs.images, inputs.image_size)
    variables = {"params": params, "batch_stats": batch_stats}
    with jax.numpy_dtype_promotion("standard"):  # Flax relies on it
        outputs, changed = model.apply(variables, images, train=train, mutable=["batch_stats"])
    return outputs, changed.get("batch_stats", batch_stats)


def network_outputs(variables: dict[str, Any], inputs: ModelInputs, *, model: RetinaNet) -> Outputs:
    """The network's outputs in inference mode.

    Args:
        variables: `params` and `batch_stats`.
        inputs: images of one replica.
    """
    outputs, _ = apply_network(
        model, variables["params"], variables["batch_stats"], inputs, train=False
    )
    return outputs


@jax.named_scope("matching")
def make_targets(batch: Batch, config: Config) -> Targets:
    """Targets [b, A] of a batch. Anchors whose center lies in the padding are ignored.

    As in the published code, the image extends to the next multiple of 32 pixels for this purpose:
    there, each image is first padded to that, and only then to the size of the batch.
    """
    anchors = _anchors(config, batch.model_inputs().padded_size)
    match = functools.partial(
        match_anchors,
        anchors,
        positive_iou=config.anchors.positive_iou,
        negative_iou=config.anchors.negative_iou,
        convention=config.anchors.convention,
        num_boxes=num_used(batch.truth.labels, batch.truth.is_crowd),
    )
    # Without `is_crowd`, crowd regions are background.
    is_crowd = batch.truth.is_crowd if config.anchors.crowd == "ignore" else None
    targets = jax.vmap(match)(batch.truth.boxes, batch.truth.labels, is_crowd)
    reach = (-(-batch.image_size // 32) * 32).astype(jnp.float32)  # [b, 2] height, width
    x, y = 0.5 * (anchors[:, 0] + anchors[:, 2]), 0.5 * (anchors[:, 1] + anchors[:, 3])
    inside = (y[None, :] < reach[:, :1]) & (x[None, :] < reach[:, 1:])  # [b, A]
    return targets._replace(classes=jnp.where(inside, targets.classes, IGNORE))


def loss_inputs(
    variables: dict[str, Any], batch: Batch, *, config: Config, model: RetinaNet
) -> tuple[jax.Array, jax.Array, Targets]:
    """The inputs of the losses for a batch, with the network in inference mode.

    Args:
        variables: `params` and `batch_stats`.
        batch: as for `train_step`.

    Returns:
        Logits f32[b, A, K], deltas f32[b, A, 4], targets [b, A] and [b, A, 4], of all levels.
    """
    logits, deltas = network_outputs(variables, batch.model_inputs(), model=model)
    return join_levels(logits), join_levels(deltas), make_targets(batch, config)


def choose_detections(outputs: Outputs, inputs: ModelInputs, *, config: Config) -> Detections:
    """Detections [b, D] from the network's outputs, in pixels of the padded image."""
    select = functools.partial(
        select_detections,
        anchors=_anchors(config, inputs.padded_size),
        score_threshold=config.predict.score_threshold,
        candidates=config.predict.candidates,
        nms_iou=config.predict.nms_iou,
        max_detections=config.predict.max_detections,
        soft_sigma=config.predict.nms_sigma,
        agnostic=config.predict.nms_classes == "all",
    )
    return jax.vmap(
        lambda logits, deltas, image_size: select(logits, deltas, image_size=image_size)
    )(*outputs, inputs.image_size)


def predict_step(
    variables: dict[str, Any], inputs: ModelInputs, *, config: Config, model: RetinaNet
) -> Detections:
    """Detections [b, D] in pixels of the padded image.

    Args:
        variables: `params` and `batch_stats`.
        inputs: images of one replica.
    """
    outputs = network_outputs(variables, inputs, model=model)
    return choose_detections(outputs, inputs, config=config)


def _anchors(config: Config, size: tuple[int, int]) -> jax.Array:
    a = config.anchors
    return jnp.asarray(make_anchors(size, a.scale, a.octaves, a.ratios, a.convention))

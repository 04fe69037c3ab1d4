"""Which anchor is responsible for which box: targets of the heads."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.detection.boxes import box_coverage, box_iou, encode_boxes
from ghm_jax.losses import BACKGROUND, IGNORE

_CROWD_COVERAGE = 0.5


class Targets(NamedTuple):
    """Targets of the A anchors of an image."""

    classes: jax.Array
    """i32[A]: class index of positive anchors, BACKGROUND (-1) or IGNORE (-2)."""
    deltas: jax.Array
    """f32[A, 4]: box deltas, meaningful where `classes >= 0`."""


def match_anchors(
    anchors: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
    is_crowd: jax.Array | None = None,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    convention: Literal["mmdetection", "torchvision"] = "mmdetection",
) -> Targets:
    """Matches the anchors of one image to its boxes by IoU; `vmap` it over a batch.

    An anchor is assigned the box it overlaps most: it is positive at or above `positive_iou`,
    background below `negative_iou`, ignored in between. In addition, every box claims the anchors
    that overlap it most, however little (but not zero): they are positive, so that every object is
    learned. Which box a claimed anchor learns depends on the convention:

    - "mmdetection", as in the published code (`min_pos_iou=0`): the one that claims it, the last
      one if there are several, even if the anchor overlaps another box more.
    - "torchvision": the one it overlaps most. (There a box that no anchor touches claims all of
      them; here it claims none.)

    Boxes without a class never match. Anchors with half of their area or more in a crowd region are
    ignored instead of being background; positive ones stay positive, unlike with mmdetection's
    `ignore_iof_thr`, which the published recipe does not set.

    Args:
        anchors: f32[A, 4].
        boxes: f32[M, 4], padded.
        labels: i32[M], class indices; NO_CLASS (-1) for padding and crowd regions.
        is_crowd: bool[M], crowd regions; None: none.
        positive_iou, negative_iou: in [0, 1], the second one not above the first.
        convention: whose rule for claimed anchors.

    Returns:
        Targets. An image without boxes is all background.
    """
    iou = jnp.where(labels[None, :] >= 0, box_iou(anchors, boxes), 0.0)  # [A, M]
    # Compared with its own maxima below: if XLA computed it twice, in two fusions that round
    # differently, a maximum might equal none of the values.
    iou = jax.lax.optimization_barrier(iou)
    number = jnp.broadcast_to(jnp.arange(boxes.shape[0], dtype=jnp.int32), iou.shape)
    # Box numbers by min and max, not argmax, which is several times slower on a CPU.
    overlap = iou.max(axis=1)  # [A]
    nearest = jnp.where(iou == overlap[:, None], number, boxes.shape[0]).min(axis=1)

    best = iou.max(axis=0)  # [M], the best overlap any anchor has with a box
    claims = (iou == best[None, :]) & (best[None, :] > 0)
    last_claim = jnp.where(claims, number, -1).max(axis=1)
    claimed = last_claim >= 0
    chosen = jnp.where(claimed, last_claim, nearest) if convention == "mmdetection" else nearest

    positive = claimed | (overlap >= positive_iou)
    background = overlap < negative_iou
    if is_crowd is not None:
        covered = jnp.where(is_crowd[None, :], box_coverage(anchors, boxes), 0.0)
        background &= covered.max(axis=1) < _CROWD_COVERAGE
    classes = jnp.where(positive, labels[chosen], jnp.where(background, BACKGROUND, IGNORE))
    deltas = encode_boxes(boxes[chosen], anchors)
    return Targets(classes.astype(jnp.int32), jnp.where(positive[:, None], deltas, 0.0))

"""Non-maximum suppression and selection of detections, with static shapes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.detection.boxes import box_iou, clip_boxes, columns, decode_boxes
from ghm_jax.detection.levels import Levels


class Detections(NamedTuple):
    """Detections of an image by descending score; unused rows have score 0 and label -1."""

    boxes: jax.Array
    """f32[D, 4], x0, y0, x1, y1 in pixels of the padded image."""
    scores: jax.Array
    """f32[D] in [0, 1]."""
    labels: jax.Array
    """i32[D], class indices."""


@jax.named_scope("suppression")
def suppress(
    boxes: jax.Array,
    scores: jax.Array,
    classes: jax.Array,
    *,
    count: int,
    threshold: float,
    iou: float,
    soft_sigma: float = 0.0,
    agnostic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The first `count` picks of greedy non-maximum suppression.

    Repeatedly picks the highest score (the first of equal ones) and suppresses the boxes that
    overlap it. At most `count` passes over N boxes, whatever the scores; no N x N IoU matrix.

    Args:
        boxes: f32[N, 4]. scores: f32[N]. classes: i32[N].
        count: number of picks.
        threshold: boxes with a score at or below it are neither picked nor suppress others.
        iou: hard NMS removes boxes that overlap a pick by more than this IoU.
        soft_sigma: Gaussian soft-NMS (Bodla et al. 2017) multiplies scores by
            exp(-IoU^2 / soft_sigma) instead; 0: hard NMS.
        agnostic: a pick suppresses boxes of all classes, not only of its own.

    Returns:
        Indices i32[count], and scores f32[count] at the time of the pick; the score is 0 where
        nothing was left above the threshold.
    """
    size = scores.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    sides = columns(boxes)

    def step(carry: Any) -> Any:
        i, scores, picks, found = carry
        best = jnp.max(scores)
        pick = jnp.min(jnp.where(scores == best, index, size - 1))
        overlap = box_iou(sides, columns(boxes[pick]))
        if soft_sigma > 0:
            left = scores * jnp.exp(-(overlap**2) / soft_sigma)
        else:
            left = jnp.where(overlap > iou, 0.0, scores)
        if not agnostic:
            left = jnp.where(classes == classes[pick], left, scores)
        left = jnp.where((index != pick) & (left > threshold), left, 0.0)
        return i + 1, left, picks.at[i].set(pick), found.at[i].set(best)

    start = (
        jnp.zeros((), jnp.int32),
        jnp.where(scores > threshold, scores, 0.0),
        jnp.zeros(count, jnp.int32),
        jnp.zeros(count, scores.dtype),
    )
    _, _, picks, found = jax.lax.while_loop(
        lambda carry: (carry[0] < count) & jnp.any(carry[1] > 0), step, start
    )
    return picks, found


def select_detections(
    logits: Levels,
    deltas: Levels,
    anchors: jax.Array,
    image_size: jax.Array,
    *,
    score_threshold: float,
    candidates: int,
    nms_iou: float,
    max_detections: int,
    soft_sigma: float = 0.0,
    agnostic: bool = False,
) -> Detections:
    """Detections of one image from the heads' outputs; `vmap` it over a batch.

    The best `candidates` (anchor, class) pairs of every level are decoded, those above the
    threshold go through NMS, and the first `max_detections` are returned. The cost does not depend
    on how many scores pass the threshold. NaN scores are never detections.

    Args:
        logits: f32[A_l, K] of each pyramid level. deltas: f32[A_l, 4]. anchors: f32[A, 4].
        image_size: [2], (height, width) of the image inside its padding; boxes are clipped to it.
        score_threshold: detections have scores above it.
        candidates: pairs kept per level.
        nms_iou, soft_sigma, agnostic: see `suppress`.
        max_detections: D.
    """
    with jax.named_scope("decoding"):
        best, start = [], 0
        for of_logits, of_deltas in zip(logits, deltas, strict=True):
            end = start + len(of_logits)
            best.append(_best_boxes(of_logits, of_deltas, anchors[start:end], candidates))
            start = end
        logit, label, boxes = map(jnp.concatenate, zip(*best, strict=True))  # [N], [N], [N, 4]
        score, boxes = jax.nn.sigmoid(logit), clip_boxes(boxes, image_size[None])

    picks, score = suppress(
        boxes,
        score,
        label,
        count=max_detections,
        threshold=score_threshold,
        iou=nms_iou,
        soft_sigma=soft_sigma,
        agnostic=agnostic,
    )
    return Detections(
        jnp.where(score[:, None] > 0, boxes[picks], 0.0),
        score,
        jnp.where(score > 0, label[picks], -1).astype(jnp.int32),
    )


def _best_boxes(
    logits: jax.Array, deltas: jax.Array, anchors: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [count], classes [count] and boxes [count, 4] of the best pairs of a level."""
    logit, pair = _best_pairs(logits, count)
    anchor, label = pair // logits.shape[1], pair % logits.shape[1]
    return logit, label, decode_boxes(deltas[anchor], anchors[anchor])


def _highest(logits: jax.Array) -> jax.Array:
    """The highest logit of each anchor, [A]; NaN logits are skipped.

    Not `max` after replacing NaN: XLA's reduction on CPU takes 20 times as long when fused with
    preceding operations, 70 ms for the 16 million logits of an 800 x 1344 image with 80 classes.
    """
    logits = jax.lax.optimization_barrier(logits)
    lowest = jnp.array(-jnp.inf, logits.dtype)
    return jax.lax.reduce(logits, lowest, lambda a, b: jnp.where(b > a, b, a), (1,))


def _best_pairs(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The highest logits of a level and their indices in its raveled logits, [count].

    Equal logits are ordered by index. The best `count` pairs lie on the `count` anchors with the
    highest maxima, so only the pairs of these anchors are sorted.

    Args:
        logits: f32[A, K].
        count: number of pairs; fewer if the level has fewer.
    """
    num_anchors, num_classes = logits.shape
    _, anchor = jax.lax.top_k(_highest(logits), min(count, num_anchors))
    anchor = jnp.sort(anchor)  # sorted, so that equal logits stay ordered by index
    few = logits[anchor].ravel()
    few = jnp.where(jnp.isnan(few), -jnp.inf, few)
    best, index = jax.lax.top_k(few, min(count, few.size))
    return best, anchor[index // num_classes] * num_classes + index % num_classes

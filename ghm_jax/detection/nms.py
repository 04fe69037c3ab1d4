"""Non-maximum suppression and the choice of detections, at static shapes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.detection.boxes import box_area, clip_boxes, decode_boxes


class Detections(NamedTuple):
    """Detections of an image by falling score; unused rows have score 0 and label -1."""

    boxes: jax.Array
    """f32[D, 4], x0, y0, x1, y1 in pixels of the padded image."""
    scores: jax.Array
    """f32[D] in [0, 1]."""
    labels: jax.Array
    """i32[D], class indices."""


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

    Pick the highest score (of equal ones the first), lower its rivals, and again: at most `count`
    passes over N boxes, however flat the scores, and no N x N overlaps.

    Args:
        boxes: f32[N, 4]. scores: f32[N]. classes: i32[N].
        count: picks.
        threshold: boxes whose score is not above it neither stay nor suppress.
        iou: of hard suppression: rivals that overlap a pick by more than this go.
        soft_sigma: of Gaussian soft-NMS (Bodla et al. 2017), where a rival's score is multiplied by
            exp(-IoU^2 / soft_sigma) instead; 0: hard.
        agnostic: all boxes are rivals, not only those of one class.

    Returns:
        Positions i32[count], and scores f32[count] at the time of the pick; 0 for picks that found
        nothing above the threshold.
    """
    size = scores.shape[0]
    place = jnp.arange(size, dtype=jnp.int32)
    x0, y0, x1, y1 = boxes.T  # columns: a pass reads them in one go
    area = box_area(boxes)

    def step(carry: Any) -> Any:
        i, scores, picks, found = carry
        best = jnp.max(scores)
        pick = jnp.min(jnp.where(scores == best, place, size - 1))
        width = jnp.minimum(x1, x1[pick]) - jnp.maximum(x0, x0[pick])
        height = jnp.minimum(y1, y1[pick]) - jnp.maximum(y0, y0[pick])
        shared = jnp.maximum(width, 0.0) * jnp.maximum(height, 0.0)
        union = area + area[pick] - shared
        overlap = jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)
        if soft_sigma > 0:
            left = scores * jnp.exp(-(overlap**2) / soft_sigma)
        else:
            left = jnp.where(overlap > iou, 0.0, scores)
        if not agnostic:
            left = jnp.where(classes == classes[pick], left, scores)
        left = jnp.where((place != pick) & (left > threshold), left, 0.0)
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
    logits: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    image_size: jax.Array,
    *,
    level_sizes: tuple[int, ...],
    score_threshold: float,
    candidates: int,
    nms_iou: float,
    max_detections: int,
    soft_sigma: float = 0.0,
    agnostic: bool = False,
) -> Detections:
    """Detections of one image from the heads' outputs; `vmap` it over a batch.

    The best `candidates` (anchor, class) pairs of every level are decoded, all of them that are
    above the threshold go through suppression, and its first `max_detections` are returned. The
    cost is the same however flat the scores. A score that is not a number is no detection.

    Args:
        logits: f32[A, K]. deltas: f32[A, 4]. anchors: f32[A, 4].
        image_size: [2], (height, width) of the image inside its padding; boxes are cut to it.
        level_sizes: anchors per pyramid level, adding up to A.
        score_threshold: least score of a detection.
        candidates: pairs kept per level.
        nms_iou, soft_sigma, agnostic: see `suppress`.
        max_detections: D.
    """
    num_classes = logits.shape[-1]
    highest = _highest(logits)
    logit, pair, start = [], [], 0
    for size in level_sizes:
        best = _best_pairs(logits, highest[start : start + size], start, candidates)
        logit.append(best[0])
        pair.append(best[1])
        start += size
    score, pair = jax.nn.sigmoid(jnp.concatenate(logit)), jnp.concatenate(pair)  # [N]
    anchor, label = pair // num_classes, pair % num_classes
    boxes = clip_boxes(decode_boxes(deltas[anchor], anchors[anchor]), image_size[None])  # [N, 4]

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


def _highest(logits: jax.Array) -> jax.Array:
    """The highest logit of each anchor, [A]; one that is not a number counts for nothing.

    Not `max` of cleaned logits: fused with anything before it, XLA's reduction on CPU takes 20
    times as long, 70 ms for the 16 million logits of an image of 800 x 1344 and 80 classes.
    """
    logits = jax.lax.optimization_barrier(logits)
    lowest = jnp.array(-jnp.inf, logits.dtype)
    return jax.lax.reduce(logits, lowest, lambda a, b: jnp.where(b > a, b, a), (1,))


def _best_pairs(
    logits: jax.Array, highest: jax.Array, start: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """The highest logits of a level and their places in the raveled logits f32[A, K], [count].

    Equal ones in the order of their places. `count` pairs lie on at most `count` anchors, those
    with the highest maxima: these are sorted, and not all pairs of the level.

    Args:
        logits: of all levels.
        highest: of each anchor of the level.
        start: the level's first anchor.
        count: pairs; fewer if the level has no more.
    """
    num_classes = logits.shape[1]
    _, anchor = jax.lax.top_k(highest, min(count, highest.size))
    anchor = start + jnp.sort(anchor)  # sorted, so that equal pairs stay in their order
    few = logits[anchor].ravel()
    few = jnp.where(jnp.isnan(few), -jnp.inf, few)
    best, place = jax.lax.top_k(few, min(count, few.size))
    return best, anchor[place // num_classes] * num_classes + place % num_classes

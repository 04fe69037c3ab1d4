"""Non-maximum suppression and the choice of detections, at static shapes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.boxes import box_iou, clip_boxes, decode_boxes


class Detections(NamedTuple):
    """Detections of an image by falling score; unused rows have score 0 and label -1."""

    boxes: jax.Array
    """f32[D, 4], x0, y0, x1, y1 in pixels of the padded image."""
    scores: jax.Array
    """f32[D] in [0, 1]."""
    labels: jax.Array
    """i32[D], class indices."""


def suppress(boxes: jax.Array, classes: jax.Array, valid: jax.Array, iou: float) -> jax.Array:
    """Greedy non-maximum suppression within each class: bool[N], True for boxes that stay.

    A box stays unless a staying box before it (a higher score) of its class overlaps it by more
    than `iou`. Repeating that sentence on all boxes at once until nothing changes gives exactly
    the greedy result, in as many rounds as the longest chain of suppressions: a few.

    Args:
        boxes: f32[N, 4] by falling score.
        classes: i32[N].
        valid: bool[N]; others neither stay nor suppress.
        iou: overlap above which the later box goes.
    """
    order = jnp.arange(boxes.shape[0])
    before = order[:, None] < order[None, :]
    rivals = before & (classes[:, None] == classes[None, :]) & (box_iou(boxes, boxes) > iou)

    def once(keep: jax.Array) -> jax.Array:
        return valid & ~jnp.any(rivals & keep[:, None], axis=0)

    def step(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return pair[1], once(pair[1])

    _, keep = jax.lax.while_loop(
        lambda pair: jnp.any(pair[0] != pair[1]), step, (valid, once(valid))
    )
    return keep


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
) -> Detections:
    """Detections of one image from the heads' outputs; `vmap` it over a batch.

    The best `candidates` (anchor, class) pairs of every level above the threshold are decoded, the
    best `candidates` of all levels go through suppression within their class, and the best
    `max_detections` of those that stay are returned. The cost is the same however flat the scores.

    Args:
        logits: f32[A, K]. deltas: f32[A, 4]. anchors: f32[A, 4].
        image_size: [2], (height, width) of the image inside its padding; boxes are cut to it.
        level_sizes: anchors per pyramid level, adding up to A.
        score_threshold: least score of a detection.
        candidates: pairs kept per level, and in all.
        nms_iou: overlap above which the lower score goes.
        max_detections: D.
    """
    num_classes = logits.shape[-1]
    scores, pairs, start = [], [], 0
    for size in level_sizes:
        level = logits[start : start + size].ravel()
        score, pair = jax.lax.top_k(level, min(candidates, level.size))
        scores.append(score)
        pairs.append(pair + start * num_classes)
        start += size
    score, place = jax.lax.top_k(
        jnp.concatenate(scores), min(candidates, sum(s.size for s in scores))
    )
    score, pair = jax.nn.sigmoid(score), jnp.concatenate(pairs)[place]  # [N]
    anchor, label = pair // num_classes, pair % num_classes
    boxes = clip_boxes(decode_boxes(deltas[anchor], anchors[anchor]), image_size[None])  # [N, 4]

    keep = suppress(boxes, label, score > score_threshold, nms_iou)
    unused = max(0, max_detections - score.size)  # D rows also where there are fewer pairs
    score, best = jax.lax.top_k(jnp.pad(jnp.where(keep, score, 0.0), (0, unused)), max_detections)
    return Detections(
        jnp.where(score[:, None] > 0, boxes[best], 0.0),
        score,
        jnp.where(score > 0, label[best], -1).astype(jnp.int32),
    )

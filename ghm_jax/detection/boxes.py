"""Boxes as arrays: `boxes` are float[..., 4] with x0, y0, x1, y1 in pixels of the padded image."""

import jax
import jax.numpy as jnp

MAX_LOG_SCALE = (
    4.135166556742356  # log(1000 / 16): a decoded side is at most 62.5 times the anchor's
)


def box_area(boxes: jax.Array) -> jax.Array:
    """Area f32[...] in square pixels; 0 for boxes with a negative side."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def box_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union f32[N, M] of a f32[N, 4] and b f32[M, 4]; 0 for empty boxes.

    Examples:
        >>> a = jnp.array([[0.0, 0.0, 2.0, 2.0]])
        >>> b = jnp.array([[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 4.0, 2.0]])
        >>> box_iou(a, b).tolist()
        [[0.5, 0.0]]
    """
    shared = _intersection(a, b)
    union = box_area(a)[:, None] + box_area(b)[None, :] - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)


def box_coverage(a: jax.Array, b: jax.Array) -> jax.Array:
    """Fraction f32[N, M] of the area of each box in a f32[N, 4] covered by each box in b f32[M, 4].

    0 for an empty box in `a`. COCO compares detections with crowd regions this way.
    """
    area = box_area(a)[:, None]
    return jnp.where(area > 0, _intersection(a, b) / jnp.where(area > 0, area, 1.0), 0.0)


def _intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection area f32[N, M] of a f32[N, 4] and b f32[M, 4]."""
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])  # [N, M, 2]
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = jnp.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]


def encode_boxes(boxes: jax.Array, anchors: jax.Array) -> jax.Array:
    """Box deltas f32[..., 4] (dx, dy, dw, dh), the inverse of `decode_boxes`.

    Center offsets in anchor sides, and log ratios of the sides, with means 0 and standard
    deviations 1 as in the published code. Sides below 0.001 pixels are clamped to that, so the
    result is finite.
    """
    center, size = _center_size(boxes)
    anchor_center, anchor_size = _center_size(anchors)
    shift = (center - anchor_center) / anchor_size
    scale = jnp.log(jnp.maximum(size, 1e-3) / anchor_size)
    return jnp.concatenate([shift, scale], axis=-1)


def decode_boxes(deltas: jax.Array, anchors: jax.Array) -> jax.Array:
    """Boxes f32[..., 4] from deltas and anchors, the inverse of `encode_boxes`.

    Log ratios are clamped to at most `MAX_LOG_SCALE`, so that extreme deltas do not overflow. This
    is torchvision's rule; mmdetection also clamps from below, which matters only for boxes smaller
    than 1/62 of their anchor.
    """
    anchor_center, anchor_size = _center_size(anchors)
    center = deltas[..., :2] * anchor_size + anchor_center
    half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * anchor_size
    return jnp.concatenate([center - half, center + half], axis=-1)


def clip_boxes(boxes: jax.Array, image_size: jax.Array) -> jax.Array:
    """Boxes f32[..., 4] clipped to an image of image_size [..., 2] (height, width) pixels."""
    height, width = image_size[..., 0], image_size[..., 1]
    limit = jnp.stack([width, height, width, height], axis=-1).astype(boxes.dtype)
    return jnp.clip(boxes, 0.0, limit)


def _center_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return 0.5 * (low + high), high - low

"""Boxes as arrays: `boxes` are float[..., 4] with x0, y0, x1, y1 in pixels of the padded image.

What compares many boxes takes them as four columns: accelerators handle arrays whose last axis is 4
poorly (a TPU pads it to 128).
"""

import jax
import jax.numpy as jnp

MAX_LOG_SCALE = (
    4.135166556742356  # log(1000 / 16): a decoded side is at most 62.5 times the anchor's
)


Columns = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""x0, y0, x1, y1 of boxes, f32[...] each."""


def columns(boxes: jax.Array) -> Columns:
    """The columns of boxes f32[..., 4]."""
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def box_area(boxes: Columns) -> jax.Array:
    """Area f32[...] in square pixels; 0 for boxes with a negative side."""
    x0, y0, x1, y1 = boxes
    return jnp.maximum(x1 - x0, 0.0) * jnp.maximum(y1 - y0, 0.0)


def box_iou(a: Columns, b: Columns) -> jax.Array:
    """Intersection over union f32[...] of boxes whose columns broadcast; 0 for empty boxes.

    Examples:
        >>> a = columns(jnp.array([0.0, 0.0, 2.0, 2.0]))
        >>> b = columns(jnp.array([[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 4.0, 2.0]]))
        >>> box_iou(a, b).tolist()
        [0.5, 0.0]
    """
    shared = _intersection(a, b)
    union = box_area(a) + box_area(b) - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)


def box_coverage(a: Columns, b: Columns) -> jax.Array:
    """Fraction f32[...] of the area of boxes `a` covered by boxes `b`, whose columns broadcast.

    0 for an empty box in `a`. COCO compares detections with crowd regions this way.
    """
    area = box_area(a)
    return jnp.where(area > 0, _intersection(a, b) / jnp.where(area > 0, area, 1.0), 0.0)


def _intersection(a: Columns, b: Columns) -> jax.Array:
    low_x, low_y = jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1])
    high_x, high_y = jnp.minimum(a[2], b[2]), jnp.minimum(a[3], b[3])
    return jnp.maximum(high_x - low_x, 0.0) * jnp.maximum(high_y - low_y, 0.0)


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

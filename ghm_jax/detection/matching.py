"""Which anchor is responsible for which box: targets of the heads."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ghm_jax.detection.boxes import Columns, box_coverage, box_iou, columns, encode_boxes
from ghm_jax.losses import BACKGROUND, IGNORE

_CROWD_COVERAGE = 0.5


class Targets(NamedTuple):
    """Targets of the A anchors of an image."""

    classes: jax.Array
    """i32[A]: class index of positive anchors, BACKGROUND (-1) or IGNORE (-2)."""
    deltas: jax.Array
    """f32[A, 4]: box deltas, meaningful where `classes >= 0`."""


class _Matches(NamedTuple):
    """What is known of the anchors [A] after some of the boxes."""

    overlap: jax.Array
    """f32, highest IoU with any box."""
    claimed: jax.Array
    """bool, whether a box overlaps no anchor more."""
    label: jax.Array
    """i32, class of the box to learn."""
    box: Columns
    """f32, the box to learn."""
    covered: jax.Array
    """f32, fraction of the anchor covered by a crowd region."""


def match_anchors(
    anchors: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
    is_crowd: jax.Array | None = None,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    convention: Literal["mmdetection", "torchvision"] = "mmdetection",
    num_boxes: jax.Array | None = None,
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
        num_boxes: i32[], `num_used` of the boxes or more; None: counted here. Under `vmap`, one
            number for all images is faster.

    Returns:
        Targets. An image without boxes is all background.
    """
    anchors, boxes, labels = map(jnp.asarray, (anchors, boxes, labels))
    is_crowd = jnp.zeros(labels.shape, bool) if is_crowd is None else jnp.asarray(is_crowd)
    count = num_used(labels, is_crowd) if num_boxes is None else num_boxes
    # One pass per box, so that nothing of size anchors x boxes is ever in memory.
    matches = jax.lax.fori_loop(
        0,
        count,
        lambda m, matches: _add_box(
            matches, columns(anchors), columns(boxes[m]), labels[m], is_crowd[m], convention
        ),
        _no_matches(anchors, boxes[0], labels[0]),
    )
    positive = matches.claimed | (matches.overlap >= positive_iou)
    background = (matches.overlap < negative_iou) & (matches.covered < _CROWD_COVERAGE)
    classes = jnp.where(positive, matches.label, jnp.where(background, BACKGROUND, IGNORE))
    deltas = encode_boxes(jnp.stack(matches.box, axis=-1), anchors)
    return Targets(classes.astype(jnp.int32), jnp.where(positive[:, None], deltas, 0.0))


def _no_matches(anchors: jax.Array, box: jax.Array, label: jax.Array) -> _Matches:
    """Before the first box; an anchor that overlaps none learns the first one, if any."""
    nothing = jnp.zeros(anchors.shape[0], jnp.float32)
    return _Matches(
        overlap=nothing,
        claimed=nothing > 0,
        label=jnp.full(anchors.shape[0], label),
        box=columns(jnp.broadcast_to(box, anchors.shape)),
        covered=nothing,
    )


def num_used(labels: jax.Array, is_crowd: jax.Array) -> jax.Array:
    """i32[], rows of padded boxes [..., M] up to the last one that is used."""
    used = jnp.any((labels >= 0) | is_crowd, axis=tuple(range(labels.ndim - 1)))  # [M]
    return jnp.max(jnp.where(used, jnp.arange(1, used.size + 1, dtype=jnp.int32), 0), initial=0)


def _add_box(
    matches: _Matches,
    anchors: Columns,
    box: Columns,
    label: jax.Array,
    is_crowd: jax.Array,
    convention: Literal["mmdetection", "torchvision"],
) -> _Matches:
    """The matches of the anchors [A] after one more box, whose values are scalars."""
    iou = jnp.where(label >= 0, box_iou(anchors, box), 0.0)
    # Compared with its own maximum: if XLA computed it twice, in two fusions that round
    # differently, the maximum might equal none of the values.
    iou = jax.lax.optimization_barrier(iou)
    best = iou.max()
    claims = (iou == best) & (best > 0)
    learned = iou > matches.overlap
    if convention == "mmdetection":
        learned = claims | (learned & ~matches.claimed)
    covered = jnp.where(is_crowd, box_coverage(anchors, box), 0.0)
    return _Matches(
        overlap=jnp.maximum(matches.overlap, iou),
        claimed=matches.claimed | claims,
        label=jnp.where(learned, label, matches.label),
        box=jax.tree.map(lambda new, old: jnp.where(learned, new, old), box, matches.box),
        covered=jnp.maximum(matches.covered, covered),
    )

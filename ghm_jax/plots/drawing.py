"""Draws ground truth and detections on images. Colors are RGB, images uint8[H, W, 3]."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_SCALE = 0.55
_PADDING = 3
_CELL = 480  # long side of an image in the grid, pixels
_GAP = 8
_CAPTION_HEIGHT = 32
# Light text on a dark strip is readable on light and on dark pages.
_CAPTION_BACKGROUND = (32, 36, 43)
_CAPTION_TEXT = (230, 233, 238)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """An image with its ground truth and detections, in pixels of the image."""

    image_id: int
    image: np.ndarray
    """uint8[H, W, 3], RGB."""
    boxes: np.ndarray
    """f32[N, 4], ground truth as x0, y0, x1, y1."""
    labels: np.ndarray
    """i32[N], class indices of the ground truth."""
    detected_boxes: np.ndarray
    """f32[D, 4], x0, y0, x1, y1."""
    detected_labels: np.ndarray
    """i32[D]."""
    detected_scores: np.ndarray
    """f32[D], in [0, 1]."""


def class_color(label: int) -> tuple[int, int, int]:
    """The fixed RGB color of a class: steps of the golden ratio around the hue circle.

    All colors are bright enough for black text.
    """
    hue = (0.58 + 0.618034 * label) % 1.0
    saturation, value = ((0.80, 1.00), (0.50, 1.00), (0.95, 0.85))[label % 3]
    rgb = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    luminance = rgb @ (0.299, 0.587, 0.114)
    white = max(0.0, (0.5 - luminance) / (1 - luminance))
    red, green, blue = (round(255 * float(c)) for c in rgb + white * (1 - rgb))
    return red, green, blue


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    scale: float = 1.0,
) -> np.ndarray:
    """Draws boxes with their class names on a scaled copy of an image.

    Args:
        image: uint8[H, W, 3], RGB.
        boxes: f32[N, 4] as x0, y0, x1, y1 in pixels of `image`, clipped to it. Boxes without area
            inside the image or with non-finite coordinates are skipped.
        labels: i32[N], class indices.
        class_names: names in label order; labels beyond them are written as numbers.
        scores: f32[N], written after the names; the highest are drawn last, on top.
        scale: the image is resized by this factor before drawing, so that lines are thin and text
            is readable on small images.

    Returns:
        uint8[round(scale * H), round(scale * W), 3].

    Raises:
        ValueError: an array has the wrong shape, or the image the wrong dtype.
    """
    boxes = np.asarray(boxes, np.float64)
    _check_shapes(image, boxes, labels, scores)
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    method = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    canvas = np.array(
        cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method)
    )
    thickness = max(1, round(min(height, width) / 300))
    order = np.arange(len(labels)) if scores is None else np.argsort(scores, kind="stable")

    drawn = []
    for i in order:
        if not np.isfinite(boxes[i]).all():
            continue
        left, top = np.maximum(np.floor(scale * boxes[i, :2]), 0)
        right, bottom = np.minimum(np.ceil(scale * boxes[i, 2:]), (width, height)) - 1
        if left > right or top > bottom:
            continue
        corners = int(left), int(top), int(right), int(bottom)
        _rectangle(canvas, corners, class_color(int(labels[i])), thickness)
        drawn.append((i, corners))
    # Names after all boxes, so that no line crosses text.
    for i, corners in drawn:
        label = int(labels[i])
        text = class_names[label] if 0 <= label < len(class_names) else str(label)
        if scores is not None:
            text += f" {100 * scores[i]:.0f}%"
        _tag(canvas, text, corners, class_color(label))
    return canvas


def _check_shapes(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray | None
) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8[H, W, 3], got {image.dtype}{list(image.shape)}")
    if boxes.shape != (len(labels), 4) or (scores is not None and len(scores) != len(labels)):
        shapes = (list(boxes.shape), len(labels), None if scores is None else len(scores))
        raise ValueError(
            "boxes, labels and scores must be [N, 4], [N] and [N], got {}, {}, {}".format(*shapes)
        )


def sample_grid(
    samples: Sequence[Sample],
    class_names: Sequence[str],
    *,
    columns: int = 2,
    min_score: float = 0.3,
) -> np.ndarray:
    """Samples in rows, each a pair of images (ground truth, detections) with captions.

    Args:
        samples: at least one.
        class_names: names in label order.
        columns: maximum number of pairs per row.
        min_score: detections below this score are not drawn.

    Returns:
        uint8[H, W, 3].
    """
    if not samples:
        raise ValueError("sample_grid: needs at least one sample")
    pairs = [_pair(sample, class_names, min_score) for sample in samples]
    columns = min(columns, len(pairs))
    width = max(pair.shape[1] for pair in pairs)
    rows = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        height = max(pair.shape[0] for pair in row)
        cells = [_pad(pair, height, width) for pair in row]
        cells += [_background(height, width)] * (columns - len(row))
        rows.append(_join(cells, axis=1))
    return _join(rows, axis=0)


def contact_sheet(
    images: Sequence[tuple[np.ndarray, str]], *, columns: int = 4, side: int = 320
) -> np.ndarray:
    """Small images with captions, in rows.

    Args:
        images: (uint8[H, W, 3], caption) pairs, at least one.
        columns: maximum number of images per row.
        side: of the square cell that each image is scaled to fit, in pixels.

    Returns:
        uint8[H, W, 3].
    """
    cells = []
    for image, text in images:
        scale = side / max(image.shape[:2])
        height, width = (max(1, round(scale * length)) for length in image.shape[:2])
        small = cv2.resize(
            np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA
        )
        cells.append(_captioned(_pad(np.asarray(small), side, side), text))
    columns = min(columns, len(cells))
    cells += [_background(side + _CAPTION_HEIGHT, side)] * (-len(cells) % columns)
    rows = [_join(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return _join(rows, axis=0)


def _pair(sample: Sample, class_names: Sequence[str], min_score: float) -> np.ndarray:
    scale = _CELL / max(sample.image.shape[:2])
    if scale > 1:
        scale = math.floor(scale)  # enlarge by integers, so that pixels stay sharp
    shown = np.asarray(sample.detected_scores) >= min_score
    truth = draw_boxes(sample.image, sample.boxes, sample.labels, class_names, scale=scale)
    found = draw_boxes(
        sample.image,
        np.asarray(sample.detected_boxes)[shown],
        np.asarray(sample.detected_labels)[shown],
        class_names,
        np.asarray(sample.detected_scores)[shown],
        scale=scale,
    )
    captions = (
        f"image {sample.image_id}: ground truth ({len(sample.labels)})",
        f"detections, score >= {100 * min_score:.0f}% ({shown.sum()})",
    )
    return _join([_captioned(truth, captions[0]), _captioned(found, captions[1])], axis=1)


def _captioned(image: np.ndarray, text: str) -> np.ndarray:
    strip = _background(_CAPTION_HEIGHT, image.shape[1])
    at = (_PADDING * 2, _CAPTION_HEIGHT - 10)
    # The text shrinks to fit narrow images.
    (text_width, _), _ = cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)
    size = _FONT_SCALE * min(1.0, (image.shape[1] - 2 * at[0]) / text_width)
    cv2.putText(strip, text, at, _FONT, max(size, 0.2), _CAPTION_TEXT, 1, cv2.LINE_AA)
    return np.concatenate([image, strip])


def _rectangle(
    canvas: np.ndarray,
    corners: tuple[int, int, int, int],
    color: tuple[int, int, int],
    thickness: int,
) -> None:
    """Draws inwards from the corner pixels, which belong to the line."""
    left, top, right, bottom = corners
    for inset in range(thickness):
        if left + inset <= right - inset and top + inset <= bottom - inset:
            first, last = (left + inset, top + inset), (right - inset, bottom - inset)
            cv2.rectangle(canvas, first, last, color, 1)


def _tag(
    canvas: np.ndarray,
    text: str,
    corners: tuple[int, int, int, int],
    color: tuple[int, int, int],
) -> None:
    """Writes on a colored tag above the box, or below it at the upper border of the image."""
    (text_width, text_height), _ = cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)
    height, width = text_height + 2 * _PADDING, text_width + 2 * _PADDING
    left, top, _, bottom = corners
    x = max(0, min(left, canvas.shape[1] - width))
    y = top - height
    if y < 0:
        y = bottom + 1 if bottom + height < canvas.shape[0] else top
    cv2.rectangle(canvas, (x, y), (x + width - 1, y + height - 1), color, cv2.FILLED)
    at = (x + _PADDING, y + _PADDING + text_height)
    cv2.putText(canvas, text, at, _FONT, _FONT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)


def _background(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _CAPTION_BACKGROUND, np.uint8)


def _pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    canvas = _background(height, width)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def _join(images: list[np.ndarray], axis: int) -> np.ndarray:
    height, width = images[0].shape[:2]
    gap = _background(height, _GAP) if axis == 1 else _background(_GAP, width)
    pieces = [piece for image in images for piece in (image, gap)][:-1]
    return np.concatenate(pieces, axis=axis)

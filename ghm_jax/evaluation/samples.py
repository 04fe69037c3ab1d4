"""The first images of a data set with their boxes and detections, for drawing."""

from typing import Any

import numpy as np

from ghm_jax.data.dataset import Dataset
from ghm_jax.data.transforms import decode_image
from ghm_jax.plots.drawing import Sample


def make_samples(
    dataset: Dataset, truth: dict[str, Any], detections: list[dict[str, Any]], count: int
) -> list[Sample]:
    """The first images of the data set with their boxes and detections."""
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}

    def of_image(rows: list[dict[str, Any]], image_id: int) -> tuple[np.ndarray, np.ndarray]:
        rows = [row for row in rows if row["image_id"] == image_id]
        boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.array([label_of[row["category_id"]] for row in rows], np.int32)

    samples = []
    for i in range(min(count, len(dataset))):
        record = dataset.source[i]
        image_id = int(record["image/id"])
        boxes, labels = of_image(truth["annotations"], image_id)
        detected_boxes, detected_labels = of_image(detections, image_id)
        scores = [row["score"] for row in detections if row["image_id"] == image_id]
        samples.append(
            Sample(
                image_id=image_id,
                image=decode_image(record["image"]),
                boxes=boxes,
                labels=labels,
                detected_boxes=detected_boxes,
                detected_labels=detected_labels,
                detected_scores=np.array(scores, np.float32),
            )
        )
    return samples

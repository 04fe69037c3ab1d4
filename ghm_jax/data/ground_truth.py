"""The boxes of a data set in COCO format, for an evaluator."""

from typing import Any

from ghm_jax.data.coco_fields import number_annotations
from ghm_jax.data.dataset import Dataset
from ghm_jax.data.schema import read_objects
from ghm_jax.data.transforms import encoded_size


def coco_ground_truth(dataset: Dataset) -> dict[str, Any]:
    """All images and objects of a data set as a COCO instances dictionary.

    Boxes (x, y, width, height) are in pixels of the stored images; crowd regions and degenerate
    boxes are included; their ids are kept where evaluators take them. Areas come from TFDS, which
    rounds them down: for published figures score against the official file.
    """
    images, annotations = [], []
    for record in dataset.source:
        image_id = int(record["image/id"])
        height, width = encoded_size(record["image"])
        file_name = record["image/filename"].decode()
        images.append({"id": image_id, "width": width, "height": height, "file_name": file_name})
        objects = read_objects(record)
        objects = objects._replace(boxes=objects.boxes_in_pixels(height, width))
        for box, label, is_crowd, area, object_id in zip(*objects, strict=True):
            x0, y0, x1, y1 = box.tolist()
            annotations.append(
                {
                    "id": int(object_id),
                    "image_id": image_id,
                    "category_id": dataset.category_ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(area),
                    "iscrowd": int(is_crowd),
                }
            )
    number_annotations(annotations)
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(dataset.category_ids, dataset.class_names, strict=True)
    ]
    return {
        "info": {"description": dataset.name},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }

"""What a record holds, and how its boxes are converted to pixels.

Every data set has the feature structure of TFDS `coco/2017`, so that one pipeline reads COCO, a
user's own folder and the embedded scenes alike. Outside this file boxes are x0, y0, x1, y1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from ghm_jax.data.coco_fields import class_names_problem

# The 80 names of COCO in label order, and their official ids: 1 to 90 with ten gaps.
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_IDS = tuple(i for i in range(1, 91) if i not in _COCO_GAPS)
COCO_CATEGORIES: dict[str, int] = dict(zip(_COCO_NAMES.split(","), _COCO_IDS, strict=True))
"""Official category id of each COCO class name, in label order."""


def detection_features(class_names: Sequence[str]) -> tfds.features.FeaturesDict:
    """The feature structure of TFDS `coco/2017`, with these classes in label order."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=list(class_names)),
                    "is_crowd": np.bool_,
                }
            ),
        }
    )


def category_ids_of(class_names: Sequence[str]) -> tuple[int, ...]:
    """COCO category ids in label order: the official ones for COCO's names, else 1..K."""
    if set(class_names) == set(COCO_CATEGORIES):
        return tuple(COCO_CATEGORIES[name] for name in class_names)
    return tuple(range(1, len(class_names) + 1))


def classes_problem(class_names: Sequence[str], category_ids: Sequence[int]) -> str:
    """Why classes cannot be those that a data set was prepared from; empty if they can be.

    TFDS keeps the names in a text file, one a line: a name that is empty or holds a line break
    comes back as no name or as two, and every later label means another class.
    """
    if len(category_ids) != len(class_names) or len(set(category_ids)) < len(category_ids):
        return f"{len(class_names)} classes have {len(set(category_ids))} category ids"
    return class_names_problem(class_names)


class Objects(NamedTuple):
    """The annotated objects of one image, N of them."""

    boxes: np.ndarray
    """f64[N, 4], x0, y0, x1, y1 as fractions of the image's width and height."""
    labels: np.ndarray
    """i32[N]"""
    is_crowd: np.ndarray
    """bool[N]"""
    areas: np.ndarray
    """i64[N], square pixels, as annotated (of the mask where there was one)."""
    ids: np.ndarray
    """i64[N]"""

    def boxes_in_pixels(self, height: int, width: int) -> np.ndarray:
        """f32[N, 4], x0, y0, x1, y1 in pixels of an image of `height` x `width` pixels."""
        return (self.boxes * np.array([width, height, width, height])).astype(np.float32)


def read_objects(record: Mapping[str, Any]) -> Objects:
    """All objects of a record, including crowd regions and degenerate boxes."""
    objects = record["objects"]
    # TFDS gives empty lists without a shape for an image without objects.
    yxyx = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)
    return Objects(
        boxes=yxyx[:, [1, 0, 3, 2]],
        labels=np.asarray(objects["label"], np.int32),
        is_crowd=np.asarray(objects["is_crowd"], bool),
        areas=np.asarray(objects["area"], np.int64),
        ids=np.asarray(objects["id"], np.int64),
    )


def trainable(objects: Objects, *, keep_crowd: bool = False) -> np.ndarray:
    """bool[N]: objects to learn from.

    Boxes without width or height are dropped, because their deltas would be infinite. So are crowd
    regions, unless `keep_crowd`: what they cover becomes background, as in the published code.
    """
    return has_area(objects.boxes) & (keep_crowd | ~objects.is_crowd)


def has_area(boxes: np.ndarray) -> np.ndarray:
    """bool[N]: boxes ([N, 4], x0, y0, x1, y1, in any unit) with a positive width and height."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.all(sides > 0, axis=1)

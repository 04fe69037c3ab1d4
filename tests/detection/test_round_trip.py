"""From the ground truth through the pipeline and back again: nothing may get lost or move."""

import dataclasses
import itertools

import pytest
from tiny import tiny_config

from ghm_jax.data import coco_ground_truth, open_dataset, train_batches
from ghm_jax.data.placement import to_original
from ghm_jax.evaluation.coco import score

BUCKETS = ((64, 96), (96, 64))


@pytest.mark.parametrize(
    "augmentation",
    [
        {"flip": 0.0},
        {"flip": 1.0},
        {"flip": 0.5, "min_short_side": 40},
        {"flip": 0.5, "zoom": (0.5, 1.0)},  # never larger than the frame, so nothing is cut off
    ],
    ids=["plain", "mirrored", "multi-scale", "zoomed out"],
)
def test_boxes_of_training_batches_placed_back_are_the_ground_truth(
    dataset_dir, augmentation, quick_compilation
):
    data = dataclasses.replace(
        tiny_config(dataset_dir).data,
        long_side=96,
        buckets=BUCKETS,
        keep_empty=True,
        **augmentation,
    )
    config = tiny_config(dataset_dir, data=data)
    dataset = open_dataset(data, "train")
    truth = coco_ground_truth(dataset)

    found: dict[int, list[dict]] = {}
    seen = dict.fromkeys(BUCKETS, 0)
    batches = train_batches(dataset, config, 0)
    for batch in itertools.islice(batches, 12):
        seen[batch["images"].shape[1:3]] += 1
        for i, image_id in enumerate(batch["image_id"].tolist()):
            kept = batch["labels"][i] >= 0
            boxes = to_original(batch["boxes"][i][kept], batch["scale"][i], batch["offset"][i])
            found[image_id] = [
                {
                    "image_id": image_id,
                    "category_id": dataset.category_ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": 1.0,
                }
                for (x0, y0, x1, y1), label in zip(
                    boxes.tolist(), batch["labels"][i][kept].tolist(), strict=True
                )
            ]
    batches.close()
    assert all(seen.values()), "both buckets must be tried"
    assert len(found) == len(dataset)
    metrics, per_class = score(truth, itertools.chain(*found.values()), "pycocotools")
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["AR100"] == pytest.approx(1.0, abs=1e-9)
    assert per_class["dark"] == per_class["light"] == pytest.approx(1.0, abs=1e-9)

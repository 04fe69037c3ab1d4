"""From the ground truth through the pipeline and back: no box may get lost or move."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ghm_jax.config import Predict
from ghm_jax.data import coco_ground_truth, open_dataset, train_batches
from ghm_jax.data.batching import Example, collate
from ghm_jax.data.placement import Placement, to_original
from ghm_jax.detection.outputs import predict_step
from ghm_jax.evaluation.coco import score
from ghm_jax.evaluation.detector import Detector
from ghm_jax.training.build import make_model
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.state import init_state

BUCKETS = ((64, 96), (96, 64))


@pytest.mark.parametrize(
    "augmentation",
    [
        {"flip": 0.0},
        {"flip": 1.0},
        {"flip": 0.5, "min_short_side": 40},
        {"flip": 0.5, "zoom": (0.5, 1.0)},  # never larger than the frame, so nothing is cropped
    ],
    ids=["plain", "mirrored", "multi-scale", "zoomed out"],
)
def test_boxes_of_training_batches_map_back_to_the_ground_truth(
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
    annotated = coco_ground_truth(dataset)

    found: dict[int, list[dict]] = {}
    seen = dict.fromkeys(BUCKETS, 0)
    batches = train_batches(dataset, config, 0)
    for loaded in itertools.islice(batches, 12):
        batch, truth = loaded.batch, loaded.batch.truth
        seen[batch.model_inputs().padded_size] += 1
        placed_back = to_original(truth.boxes, loaded.scale, loaded.offset)
        for i, image_id in enumerate(batch.image_id.tolist()):
            kept = truth.labels[i] >= 0
            found[image_id] = [
                {
                    "image_id": image_id,
                    "category_id": dataset.category_ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": 1.0,
                }
                for (x0, y0, x1, y1), label in zip(
                    placed_back[i][kept].tolist(), truth.labels[i][kept].tolist(), strict=True
                )
            ]
    batches.close()
    assert all(seen.values()), "both buckets must be tried"
    assert len(found) == len(dataset)
    metrics, per_class = score(annotated, itertools.chain(*found.values()), "pycocotools")
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["AR100"] == pytest.approx(1.0, abs=1e-9)
    assert per_class["dark"] == per_class["light"] == pytest.approx(1.0, abs=1e-9)


PLACEMENTS = [
    Placement((32, 48), (64, 96), (0, 0), (64, 96), mirrored=False),
    Placement((40, 96), (40, 48), (0, 0), (40, 48), mirrored=True),  # two scales
    Placement((40, 60), (100, 150), (20, 40), (64, 96), mirrored=False),  # a crop of the image
    Placement((60, 40), (120, 80), (30, 10), (64, 64), mirrored=True),
]


def test_detections_of_placed_images_are_in_stored_pixels(rng, quick_compilation):
    """The detector inverts the whole placement of an image, not only its scale."""
    config = tiny_config(predict=Predict(score_threshold=0.0, candidates=20, max_detections=10))
    examples = []
    for placement in PLACEMENTS:
        stored = rng.integers(0, 256, (*placement.original, 3), np.uint8)
        image = placement.place_image(stored)
        examples.append(Example(image, scale=placement.scale, offset=placement.offset, valid=True))
    loaded = collate(examples, (64, 96), max_boxes=1)
    model = make_model(config, 3)
    state = jax.jit(functools.partial(init_state, config, model, make_optimizer(config)))()
    step = jax.jit(functools.partial(predict_step, config=config, model=model))
    placed = jax.tree.map(np.asarray, step(state.variables, loaded.batch.model_inputs()))
    found = Detector(config, 3, jax.devices()[:1])(state.variables, loaded)

    assert (placed.labels >= 0).sum(axis=1).min() > 3
    np.testing.assert_array_equal(found.labels, placed.labels)
    for i, ((height, width), scaled, (top, left), size, mirrored) in enumerate(PLACEMENTS):
        x0, y0, x1, y1 = placed.boxes[i][placed.labels[i] >= 0].astype(np.float64).T
        if mirrored:
            x0, x1 = size[1] - x1, size[1] - x0
        x0, x1 = ((x + left) * width / scaled[1] for x in (x0, x1))
        y0, y1 = ((y + top) * height / scaled[0] for y in (y0, y1))
        boxes = found.boxes[i][found.labels[i] >= 0]
        np.testing.assert_allclose(boxes, np.stack([x0, y0, x1, y1], axis=1), atol=1e-3)

"""A run small enough for a test: a config, a data set of drawn images, one batch."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import jax
import numpy as np

from ghm_jax.batch import NO_CLASS, Batch, GroundTruth
from ghm_jax.config import (
    Anchors,
    Config,
    Data,
    Harmonizing,
    Loss,
    Model,
    Optimizer,
    Predict,
    Run,
)
from ghm_jax.data import prepare_folder
from ghm_jax.progress import Silent

CATEGORIES = {2: "dark", 5: "light", 9: "absent"}  # ids with gaps; no object is `absent`
SIDE = 64
GHM_C, GHM_R = Harmonizing(bins=10), Harmonizing(bins=5, momentum=0.7)


def tiny_config(data_dir: str | Path = "data", **sections) -> Config:
    """Six steps of four images on two devices; `sections` replace sections of the config."""
    default = {
        "data": Data(
            name="squares",
            dir=str(data_dir),
            short_side=SIDE,
            long_side=SIDE,
            buckets=((SIDE, SIDE),),
            max_boxes=4,
            keep_empty=True,
        ),
        "model": Model(
            backbone="resnet10", width=4, norm="group", channels=8, head_convs=0, dtype="float32"
        ),
        "anchors": Anchors(scale=2.0, octaves=1, ratios=(1.0,)),
        "loss": Loss(ghm_c=GHM_C, ghm_r=GHM_R),
        "optimizer": Optimizer(
            name="adamw",
            batch_size=4,
            steps=6,
            learning_rate=3e-3,
            warmup_steps=2,
            schedule="cosine",
        ),
        "predict": Predict(batch_size=4, candidates=20, max_detections=10),
        "run": Run(devices=2, workers=0, log_every=1, checkpoint_every=3),
    }
    return Config(**(default | sections))


def draw_image(rng: np.random.Generator, height: int, width: int, count: int):
    """A grey image with `count` squares that do not touch: uint8[H, W, 3], boxes, category ids."""
    image = rng.integers(110, 140, (height, width, 3)).astype(np.uint8)
    boxes, categories = [], []
    for i in range(count):  # one in each quarter
        side = int(rng.integers(min(height, width) // 5, min(height, width) // 3))
        left, top = (i % 2) * width // 2, (i // 2) * height // 2
        x = left + int(rng.integers(width // 2 - side))
        y = top + int(rng.integers(height // 2 - side))
        category = (2, 5)[int(rng.integers(2))]
        image[y : y + side, x : x + side] = 20 if category == 2 else 235
        boxes.append([x, y, x + side, y + side])
        categories.append(category)
    return image, np.array(boxes, np.float32).reshape(-1, 4), categories


def write_dataset(folder: Path) -> Path:
    """Prepares `squares` in `folder / "data"` and returns that directory."""
    prepare_folder("squares", folder / "data", write_images(folder))
    return folder / "data"


def write_images(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The images of `squares` and their annotations, by split, to be prepared.

    Ten images to train on and six to validate (not a multiple of the batch size), of several sizes;
    in each split one without boxes, in the validation split one with a crowd region.
    """
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 10), ("validation", 6)):
        images, annotations = [], []
        for i in range(count):
            height, width = ((64, 64), (128, 96), (48, 64))[i % 3]
            pixels, boxes, categories = draw_image(rng, height, width, 0 if i == 1 else 1 + i % 3)
            name, image_id = f"{split}{i}.png", 100 * len(splits) + 7 * i + 1
            (folder / name).write_bytes(cv2.imencode(".png", pixels)[1])
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for (x0, y0, x1, y1), category in zip(boxes.tolist(), categories, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": int(split == "validation" and i == 2 and x0 == boxes[0, 0]),
                    }
                )
        path = folder / f"{split}.json"
        categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        path.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
        splits[split] = (folder, path)
    return splits


def tiny_batch(rng: np.random.Generator, size: int = 8) -> Batch:
    """A batch as `ghm_jax.data.batching.collate` makes it; the second image has no boxes."""
    batch = Batch(
        images=np.zeros((size, SIDE, SIDE, 3), np.uint8),
        image_size=np.full((size, 2), SIDE, np.int32),
        image_id=100 + np.arange(size, dtype=np.int32),
        truth=GroundTruth(
            boxes=np.zeros((size, 4, 4), np.float32),
            labels=np.full((size, 4), NO_CLASS, np.int32),
            is_crowd=np.zeros((size, 4), bool),
        ),
    )
    for i in range(size):
        image, boxes, categories = draw_image(rng, SIDE, SIDE, 0 if i == 1 else 1 + i % 3)
        batch.images[i] = image
        batch.truth.boxes[i, : len(boxes)] = boxes
        batch.truth.labels[i, : len(boxes)] = [(2, 5).index(c) for c in categories]
    return batch


class Listener(Silent):
    """Records messages and steps; calls `action` at the update of step `at`."""

    def __init__(self, at: int = -1, action: Callable[[], None] = lambda: None):
        self.lines, self.steps = [], []
        self._at, self._action = at, action

    def say(self, line):
        self.lines.append(line)

    def update(self, name, done, total, fields):
        self.steps.append(done)
        if done == self._at:
            self._action()


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles programs in a third of the time; they run slower, which does not matter."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

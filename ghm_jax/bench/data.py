"""CPU time of the input pipeline per image, stage by stage.

CPU time is summed over all threads, so the reciprocal is images per second and core, even on a busy
machine. The limit is OpenCV's decoding and resizing alone, which every pipeline on a host needs.
"""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from ghm_jax.bench.timing import time_rounds
from ghm_jax.config import Config, Data, Optimizer, Run
from ghm_jax.data.batching import Example, choose_bucket, collate, make_example
from ghm_jax.data.dataset import Dataset
from ghm_jax.data.loader import train_batches
from ghm_jax.data.placement import choose_placement
from ghm_jax.data.transforms import decode_image

DECODE = "cv2 decode"
LIMIT = "cv2 decode + resize"
PIPELINE = "record to batch"
TF_DATA = "tf.data: decode, resize, flip, pad, batch"
_BATCH = 8
_BOXES = 8  # per image; COCO has 7.3


@dataclass(frozen=True)
class StageTime:
    """Time of one stage."""

    stage: str
    milliseconds: float
    """CPU time per image, median over the repeats."""
    fastest: float
    """CPU time per image in the fastest repeat."""
    images_per_second: float
    """Of one core: 1000 / milliseconds."""
    of_limit: float
    """`images_per_second` relative to `LIMIT`."""


@dataclass(frozen=True)
class LoaderRate:
    """Throughput of the training loader in wall time."""

    workers: int
    """Processes that decode; 0: threads of this process."""
    images_per_second: float
    """Of the whole machine, after the first batches."""


def measure_data(
    source_size: tuple[int, int] = (480, 640), repeats: int = 7, data: Data | None = None
) -> list[StageTime]:
    """Times every stage on JPEG images, and with TensorFlow installed tf.data.

    Args:
        source_size: (height, width) of the stored images in pixels.
        repeats: timed rounds, after one that warms up.
        data: target size and buckets; None: COCO's, 800 x 1333 padded to 800 x 1344.
    """
    data = data or Data()
    records = make_records(2 * _BATCH, source_size)
    with _one_thread():
        stages = _stages(records, data)
        times = [*time_rounds(list(stages.values()), repeats).cpu]
        # Timed separately: whatever runs right after TensorFlow is slower.
        if importlib.util.find_spec("tensorflow"):
            stages[TF_DATA] = _tf_data(records, data)
            times += [*time_rounds([stages[TF_DATA]], repeats).cpu]
    per_image = {stage: values / len(records) for stage, values in zip(stages, times, strict=True)}
    limit = float(np.median(per_image[LIMIT]))
    measured = []
    for stage, values in per_image.items():
        median, fastest = float(np.median(values)), float(values.min())
        measured.append(StageTime(stage, median, fastest, 1000 / median, limit / median))
    return measured


def measure_loader(
    workers: tuple[int, ...] = (0, 1, 2),
    source_size: tuple[int, int] = (480, 640),
    num_batches: int = 20,
    data: Data | None = None,
) -> list[LoaderRate]:
    """Times `train_batches` in wall time; rates depend on other work on the machine.

    Args:
        workers: numbers of processes to try.
        source_size: see `measure_data`.
        num_batches: timed batches of 8 images.
        data: see `measure_data`.
    """
    records = make_records(4 * _BATCH, source_size)
    dataset = Dataset(source=records, name="noise", class_names=("thing",), category_ids=(1,))
    rates = []
    for count in workers:
        config = Config(
            data=data or Data(), optimizer=Optimizer(batch_size=_BATCH), run=Run(workers=count)
        )
        batches = train_batches(dataset, config, 0)
        try:
            ahead = 4 + 2 * count  # batches that were prefetched before the timing starts
            for _ in range(ahead):
                next(batches)
            start = time.perf_counter()
            for _ in range(num_batches):
                next(batches)
            elapsed = time.perf_counter() - start
        finally:
            batches.close()
        rates.append(LoaderRate(count, num_batches * _BATCH / elapsed))
    return rates


def make_records(count: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Records of a `Dataset`: JPEGs of (height, width) pixels with boxes.

    Smooth shapes under fine noise: 640 x 480 pixels take about 150 kB, as in COCO.
    """
    rng = np.random.default_rng(0)
    height, width = size
    records = []
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 40 + 1, width // 40 + 1, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        noise = rng.normal(0, 9, (height, width, 1))
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        corners = np.sort(rng.uniform(0, 1, (_BOXES, 2, 2)), axis=1).astype(np.float32)
        records.append(
            {
                "image": cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes(),
                "image/filename": f"{i}.jpg".encode(),
                "image/id": i,
                "objects": {
                    "bbox": list(corners.reshape(_BOXES, 4)),
                    "label": [0] * _BOXES,
                    "is_crowd": [False] * _BOXES,
                    "area": [1] * _BOXES,
                    "id": list(range(_BOXES)),
                },
            }
        )
    return records


def _stages(records: list[dict[str, Any]], data: Data) -> dict[str, Callable[[], object]]:
    """Name -> a function that processes all records once."""
    encoded = [record["image"] for record in records]
    buffers = [np.frombuffer(image, np.uint8) for image in encoded]
    images = [decode_image(image) for image in encoded]
    shrink = choose_placement(images[0].shape[:2], data, None)
    height, width = shrink.size
    mirror = shrink._replace(original=shrink.scaled, mirrored=True)
    resized = [cv2.resize(image, (width, height)) for image in images]
    examples = [make_example(record, data, None) for record in records]

    def decode(buffer: np.ndarray) -> np.ndarray:
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError("cannot decode the image")
        return image

    bucket = choose_bucket((height, width), data.buckets)

    def batch(of: list[Example]) -> None:
        for start in range(0, len(of), _BATCH):
            collate(of[start : start + _BATCH], bucket, data.max_boxes)

    def pipeline() -> None:
        for start in range(0, len(records), _BATCH):
            # Like the loader, holds no more than a batch of images.
            batch(
                [
                    make_example(record, data, np.random.default_rng(start))
                    for record in records[start : start + _BATCH]
                ]
            )

    def each(function: Callable[..., object], arguments: list[Any]) -> Callable[[], object]:
        return lambda: [function(argument) for argument in arguments]

    return {
        DECODE: each(decode, buffers),
        LIMIT: each(lambda buffer: cv2.resize(decode(buffer), (width, height)), buffers),
        "decode": each(decode_image, encoded),
        "resize": each(shrink.place_image, images),
        "flip": each(mirror.place_image, resized),
        "batch": functools.partial(batch, examples),
        PIPELINE: pipeline,
    }


def _tf_data(records: list[dict[str, Any]], data: Data) -> Callable[[], object]:
    """The same for the images only (boxes cost little), following tf.data's guides."""
    tf: Any = importlib.import_module("tensorflow")
    encoded = tf.constant([record["image"] for record in records])
    height, width = data.buckets[0]

    def example(image: Any) -> Any:
        image = tf.io.decode_jpeg(image, channels=3)
        size = tf.cast(tf.shape(image)[:2], tf.float32)
        scale = tf.minimum(
            data.short_side / tf.reduce_min(size), data.long_side / tf.reduce_max(size)
        )
        image = tf.image.resize(image, tf.cast(tf.round(size * scale), tf.int32))
        image = tf.image.random_flip_left_right(tf.cast(image, tf.uint8))
        return tf.image.pad_to_bounding_box(image, 0, 0, height, width)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    batches = tf.data.Dataset.from_tensor_slices(encoded).map(example).batch(_BATCH)
    batches = batches.with_options(options)
    return lambda: [batch.numpy() for batch in batches]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV without threads, whose start and stop would be measured as well."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)

"""Time of inference: from images to detections, of the network alone and of the suppression alone.

Weights are random. What matters of trained ones is how many scores pass the threshold, and that is
set here: a few hundred an image, as after focal loss, or all of them, as at worst after GHM.
"""

import functools
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ghm_jax.bench.case import DetectorCase
from ghm_jax.config import Config, Predict
from ghm_jax.data.batching import Example, collate
from ghm_jax.detection.outputs import choose_detections, network_outputs
from ghm_jax.distributed.devices import (
    Device,
    jit_init,
    parallelize,
    replicate,
    split_batch,
)
from ghm_jax.evaluation.detector import Detector
from ghm_jax.training.build import build

_PEAKED = 300  # (anchor, class) pairs an image that pass the threshold, if all do not

_OPERATORS = (  # of torchvision: what importing it looks for
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int batch_size, int channels, int height, int width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


@dataclass(frozen=True, kw_only=True)
class Case(DetectorCase):
    """A detector whose calls are timed."""

    batch_size: int = 2
    """Images a call, over all devices."""

    @property
    def config(self) -> Config:
        """What a run would have."""
        return self.config_with(predict=Predict(batch_size=self.batch_size))


@dataclass(frozen=True)
class Row:
    """A detector with scores of one kind."""

    detector: str
    scores: str
    """Peaked: some hundred (anchor, class) pairs an image pass the threshold; flat: all do."""
    candidates: int
    """How many do."""
    detections: float
    """An image."""
    milliseconds: float
    """A call, from uint8 images in memory to detections in memory: median over the repeats, which
    go round everything that is timed."""
    fastest: float
    """Fewest milliseconds of a call."""
    images_per_second: float
    network: float | None
    """Milliseconds of the network alone; None: not timed."""
    selection: float | None
    """Milliseconds alone of what comes after it: the best pairs, decoding, suppression."""

    @property
    def share(self) -> float | None:
        """Of the selection in the time of both."""
        if self.network is None or self.selection is None:
            return None
        return self.selection / (self.network + self.selection)


@dataclass(frozen=True)
class _Timed:
    """What is timed for a row, each without arguments."""

    detector: str
    scores: str
    candidates: int
    detections: float
    calls: tuple[Callable[[], Any], ...]
    """End to end, and where known network and selection."""


def measure_inference(case: Case, devices: Sequence[Device], repeats: int = 5) -> list[Row]:
    """Times a detector; where torch and torchvision are installed, torchvision's RetinaNet too.

    Args:
        case: what to time.
        devices: as many as divide the batch.
        repeats: timed rounds, after one that compiles.
    """
    timed = _ours(case, devices) + _torchvision(case)
    calls = [call for row in timed for call in row.calls]
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 1):
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if i > 0:
                of_call.append(1e3 * (time.perf_counter() - start))
    rows = []
    for row in timed:
        end_to_end, *parts = (times.pop(0) for _ in row.calls)
        network, selection = map(float, map(np.median, parts)) if parts else (None, None)
        rows.append(
            Row(
                detector=row.detector,
                scores=row.scores,
                candidates=row.candidates,
                detections=row.detections,
                milliseconds=float(np.median(end_to_end)),
                fastest=min(end_to_end),
                images_per_second=1e3 * case.batch_size / float(np.median(end_to_end)),
                network=network,
                selection=selection,
            )
        )
    return rows


def _images(case: Case) -> np.ndarray:
    """Noise, u8[B, H, W, 3]."""
    shape = case.batch_size, *case.image_size, 3
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _last_layer(logits: np.ndarray, threshold: float) -> tuple[float, dict[str, float]]:
    """How the last layer of a fresh network has to change for scores of each kind.

    Args:
        logits: [B, ...] of the network, the last layer's bias left out: small beside it, they would
            lose their digits.
        threshold: of the scores.

    Returns:
        A factor for its kernel, which gives the logits a deviation of 1, and its bias by kind.
    """
    factor = 1 / float(logits.std())
    values = np.sort(logits.ravel() * factor)
    passing = {"peaked": min(values.size, _PEAKED * len(logits)), "flat": values.size}
    limit = float(np.log(threshold / (1 - threshold))) + 1e-3  # beyond what rounding moves
    return factor, {kind: limit - float(values[values.size - n]) for kind, n in passing.items()}


def _ours(case: Case, devices: Sequence[Device]) -> list[_Timed]:
    config = case.config
    trainer = build(config, case.num_classes)
    state = jit_init(trainer.init_state, devices[0])()
    examples = [Example(image, valid=True) for image in _images(case)]
    loaded = collate(examples, case.image_size, max_boxes=1)
    on_devices = split_batch(loaded.batch.model_inputs(), len(devices))
    over_devices = functools.partial(
        parallelize, devices=list(devices), wrapper=config.run.wrapper, split_output=True
    )
    detector = Detector(config, case.num_classes, devices)
    network: Any = over_devices(functools.partial(network_outputs, model=trainer.model))
    select: Any = over_devices(lambda _, given: choose_detections(*given, config=config))

    variables = replicate(state.variables, list(devices))
    threshold = config.predict.score_threshold
    last = variables["params"]["class_head"]["output"]

    def with_last(factor: float, bias: float) -> dict[str, Any]:
        changed = jax.tree.map(lambda x: x, variables)  # dicts of their own
        kernel, zeros = last["kernel"] * factor, last["bias"] * 0
        changed["params"]["class_head"]["output"] = {"kernel": kernel, "bias": zeros + bias}
        return changed

    logits = np.asarray(network(with_last(1, 0), on_devices)[0]).reshape(case.batch_size, -1)
    factor, biases = _last_layer(logits, threshold)
    timed = []
    for scores, bias in biases.items():
        shifted = with_last(factor, bias)
        outputs = network(shifted, on_devices)
        found = detector(shifted, loaded)
        timed.append(
            _Timed(
                detector="ghm-jax",
                scores=scores,
                candidates=_count_passing(outputs[0], case.batch_size, threshold),
                detections=float(np.sum(found.labels >= 0)) / case.batch_size,
                calls=(
                    functools.partial(detector, shifted, loaded),
                    functools.partial(_wait, network, shifted, on_devices),
                    functools.partial(_wait, select, shifted, (outputs, on_devices)),
                ),
            )
        )
    return timed


def _count_passing(logits: Any, images: int, threshold: float) -> int:
    """Scores above the threshold, an image."""
    return int(np.sum(np.asarray(logits) > np.log(threshold / (1 - threshold)))) // images


def _wait(function: Callable[..., Any], *args: Any) -> None:
    jax.block_until_ready(function(*args))


def _torchvision(case: Case) -> list[_Timed]:
    """Its RetinaNet of the same size, in its fast memory format; nothing where it lacks it."""
    if case.backbone != "resnet50" or case.channels != 256:
        return []
    try:
        torch: Any = importlib.import_module("torch")
        torchvision, label = _import_torchvision(torch)
    except ImportError:
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=case.num_classes,
        min_size=min(case.image_size),
        max_size=max(case.image_size),
    )
    model = model.eval().to(device, memory_format=torch.channels_last)
    images, low_precision = _images(case), case.dtype == "bfloat16"

    def run() -> list[dict[str, Any]]:
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, low_precision):
            found = model(list(batch.float() / 255))
        return [{name: value.cpu().numpy() for name, value in each.items()} for each in found]

    seen: list[np.ndarray] = []
    head = model.head.classification_head
    head.register_forward_hook(lambda *args: seen.append(args[-1].float().cpu().numpy()))
    last = head.cls_logits
    last.bias.data.zero_()
    run()
    factor, biases = _last_layer(seen[0].reshape(case.batch_size, -1), model.score_thresh)
    last.weight.data *= factor
    timed = []
    for scores, bias in biases.items():

        def call(bias: float = bias) -> list[dict[str, Any]]:
            last.bias.data.fill_(bias)
            return run()

        seen.clear()
        found = sum(len(each["scores"]) for each in call()) / case.batch_size
        candidates = _count_passing(seen[0], case.batch_size, model.score_thresh)
        timed.append(_Timed(label, scores, candidates, found, (call,)))
    head._forward_hooks.clear()
    return timed


def _import_torchvision(torch: Any) -> tuple[Any, str]:
    """torchvision and what to call it.

    Builds for GPUs do not import where there is none, for want of their compiled operators. Of
    these RetinaNet needs suppression alone, which is then left out: a time to its advantage.
    """
    try:
        return importlib.import_module("torchvision"), "torchvision"
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = declare_operators(torch)
        torchvision: Any = importlib.import_module("torchvision")
        torchvision.declared = library  # the declarations go when it does
        torchvision.ops.boxes.nms = lambda boxes, scores, iou: scores.argsort(descending=True)
        return torchvision, "torchvision without suppression"


def declare_operators(torch: Any) -> Any:
    """The names of torchvision's compiled operators, so that it can be imported without them. They
    last as long as what is returned."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in _OPERATORS:
        library.define(schema)
    return library

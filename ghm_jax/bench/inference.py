"""Time of inference: from images to detections, of the network alone and of the NMS alone.

Weights are random. The only property of trained weights that matters for the time is how many
scores pass the threshold, and that is set here: a few hundred per image, as after focal loss, or
all of them, the worst case after GHM.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ghm_jax.bench.case import DetectorCase
from ghm_jax.bench.timing import time_rounds
from ghm_jax.bench.torchvision import import_torchvision
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

_PEAKED = 300  # (anchor, class) pairs per image above the threshold, unless all are


@dataclass(frozen=True, kw_only=True)
class InferenceCase(DetectorCase):
    """A detector whose inference is timed."""

    batch_size: int = 2
    """Images per call, over all devices."""

    @property
    def config(self) -> Config:
        """The config of such a run."""
        return self.config_with(predict=Predict(batch_size=self.batch_size))


@dataclass(frozen=True)
class InferenceTime:
    """Time of a detector with one distribution of scores."""

    detector: str
    scores: str
    """peaked: a few hundred (anchor, class) pairs per image pass the threshold; flat: all do."""
    candidates: int
    """Pairs per image that pass the threshold."""
    detections: float
    """Per image."""
    milliseconds: float
    """Per call, from uint8 images to detections, both in host memory: median over the repeats."""
    fastest: float
    """Milliseconds of the fastest call."""
    images_per_second: float
    network: float | None
    """Milliseconds of the network alone; None: not timed."""
    selection: float | None
    """Milliseconds of the selection alone: best pairs, decoding, NMS."""

    @property
    def share(self) -> float | None:
        """The selection's share of the time of network and selection."""
        if self.network is None or self.selection is None:
            return None
        return self.selection / (self.network + self.selection)


@dataclass(frozen=True)
class _Detector:
    """A detector that is ready to be timed."""

    name: str
    scores: str
    candidates: int
    detections: float
    calls: tuple[Callable[[], Any], ...]
    """End to end and, where they can be separated, network and selection."""


def measure_inference(
    case: InferenceCase, devices: Sequence[Device], repeats: int = 5
) -> list[InferenceTime]:
    """Times a detector and, where torch and torchvision are installed, torchvision's RetinaNet.

    Args:
        case: what to time.
        devices: their number must divide the batch size.
        repeats: timed rounds, after one that compiles.
    """
    detectors = _ours(case, devices) + _torchvision(case)
    times = iter(time_rounds([call for d in detectors for call in d.calls], repeats).wall)
    measured = []
    for detector in detectors:
        end_to_end, *stages = (next(times) for _ in detector.calls)
        network, selection = map(float, map(np.median, stages)) if stages else (None, None)
        measured.append(
            InferenceTime(
                detector=detector.name,
                scores=detector.scores,
                candidates=detector.candidates,
                detections=detector.detections,
                milliseconds=float(np.median(end_to_end)),
                fastest=float(end_to_end.min()),
                images_per_second=1e3 * case.batch_size / float(np.median(end_to_end)),
                network=network,
                selection=selection,
            )
        )
    return measured


def _images(case: InferenceCase) -> np.ndarray:
    """Noise, u8[B, H, W, 3]."""
    shape = case.batch_size, *case.padded_size, 3
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def last_layer(logits: np.ndarray, threshold: float) -> tuple[float, dict[str, float]]:
    """How to change the last layer of an untrained network for each distribution of scores.

    Args:
        logits: [B, ...] of the network without the last layer's bias, which would cost them
            precision.
        threshold: of the scores.

    Returns:
        A factor for the kernel that gives the logits a standard deviation of 1, and the bias for
        `peaked` and `flat` scores.
    """
    factor = 1 / float(logits.std())
    values = np.sort(logits.ravel() * factor)
    passing = {"peaked": min(values.size, _PEAKED * len(logits)), "flat": values.size}
    limit = float(np.log(threshold / (1 - threshold))) + 1e-3  # beyond rounding errors
    return factor, {kind: limit - float(values[values.size - n]) for kind, n in passing.items()}


def _ours(case: InferenceCase, devices: Sequence[Device]) -> list[_Detector]:
    config = case.config
    trainer = build(config, case.num_classes)
    state = jit_init(trainer.init_state, devices[0])()
    examples = [Example(image, valid=True) for image in _images(case)]
    loaded = collate(examples, case.padded_size, max_boxes=1)
    on_devices = split_batch(loaded.batch.model_inputs(), len(devices))
    over_devices = functools.partial(
        parallelize, devices=list(devices), wrapper=config.run.wrapper, split_output=True
    )
    detector = Detector(config, case.num_classes, devices)
    network: Any = over_devices(functools.partial(network_outputs, model=trainer.model))
    select: Any = over_devices(lambda _, inputs: choose_detections(*inputs, config=config))

    variables = replicate(state.variables, list(devices))
    threshold = config.predict.score_threshold
    last = variables["params"]["class_head"]["output"]

    def with_last(factor: float, bias: float) -> dict[str, Any]:
        changed = jax.tree.map(lambda x: x, variables)  # copies the dicts
        kernel, zeros = last["kernel"] * factor, last["bias"] * 0
        changed["params"]["class_head"]["output"] = {"kernel": kernel, "bias": zeros + bias}
        return changed

    def flat(outputs: Any) -> np.ndarray:
        """Logits of all levels, a row per image."""
        rows = [np.asarray(level).reshape(case.batch_size, -1) for level in outputs[0]]
        return np.concatenate(rows, axis=1)

    factor, biases = last_layer(flat(network(with_last(1, 0), on_devices)), threshold)
    detectors = []
    for scores, bias in biases.items():
        shifted = with_last(factor, bias)
        outputs = network(shifted, on_devices)
        found = detector(shifted, loaded)
        detectors.append(
            _Detector(
                name="ghm-jax",
                scores=scores,
                candidates=_count_passing(flat(outputs), case.batch_size, threshold),
                detections=float(np.sum(found.labels >= 0)) / case.batch_size,
                calls=(
                    functools.partial(detector, shifted, loaded),
                    functools.partial(_wait, network, shifted, on_devices),
                    functools.partial(_wait, select, shifted, (outputs, on_devices)),
                ),
            )
        )
    return detectors


def _count_passing(logits: Any, images: int, threshold: float) -> int:
    """Scores per image above the threshold."""
    return int(np.sum(np.asarray(logits) > np.log(threshold / (1 - threshold)))) // images


def _wait(function: Callable[..., Any], *args: Any) -> None:
    jax.block_until_ready(function(*args))


def _torchvision(case: InferenceCase) -> list[_Detector]:
    """torchvision's RetinaNet in channels_last format; empty where it has no such network."""
    if case.backbone != "resnet50" or case.channels != 256:
        return []
    try:
        torchvision, complete = import_torchvision()
    except ImportError:
        return []
    torch: Any = importlib.import_module("torch")
    label = "torchvision"
    if not complete:  # its suppression is omitted: an advantage in time
        label = "torchvision without suppression"
        torchvision.ops.boxes.nms = lambda boxes, scores, iou: scores.argsort(descending=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=case.num_classes,
        min_size=min(case.padded_size),
        max_size=max(case.padded_size),
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
    factor, biases = last_layer(seen[0].reshape(case.batch_size, -1), model.score_thresh)
    last.weight.data *= factor
    detectors = []
    for scores, bias in biases.items():

        def call(bias: float = bias) -> list[dict[str, Any]]:
            last.bias.data.fill_(bias)
            return run()

        seen.clear()
        found = sum(len(each["scores"]) for each in call()) / case.batch_size
        candidates = _count_passing(seen[0], case.batch_size, model.score_thresh)
        detectors.append(_Detector(label, scores, candidates, found, (call,)))
    head._forward_hooks.clear()
    return detectors

"""Every setting that decides a result, as frozen dataclasses with defaults and checks.

The defaults are the published RetinaNet-R50 recipe on COCO with the package's own GHM settings.
An experiment file holds `config = Config(...)`; any field can be overridden on the command line
by its dotted name (`--loss.ghm-c.momentum 0.9`). Bounds stand beside the fields, rules across
fields below the sections. Nothing here reads or writes a file.
"""

import contextlib
import dataclasses
import difflib
import itertools
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ghm_jax.bounds import BelowOne, Bound, Fraction, NotNegative, Positive, kind_of, problems
from ghm_jax.exceptions import ConfigError

# Experiment files import everything that a config consists of from this module.
from ghm_jax.harmonizing import REFERENCE as REFERENCE
from ghm_jax.harmonizing import Harmonizing as Harmonizing
from ghm_jax.json_text import shown


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images to use, and how they become arrays of fixed shape."""

    name: str = "coco/2017"
    """TFDS name of the data set; empty: the only one in `dir`; the run stores its name."""
    dir: str = "data"
    """Directory that holds prepared TFDS data sets (array_record), or gs://BUCKET/DIR."""
    cache: str = ""
    """Directory for copies of what is needed of a data set in a bucket; empty: `data` in
    $GHM_JAX_CACHE, or in ~/.cache/ghm_jax."""
    train_split: str = "train"
    """TFDS split to train on."""
    validation_split: str = "validation"
    """TFDS split to evaluate on."""
    annotations: str = ""
    """Official instances JSON of the validation split to score against; empty: the data set's own
    boxes. TFDS rounds areas down, so published figures need the official file."""
    classes: tuple[str, ...] = ()
    """Class names in label order; read from the data set when a run starts."""
    short_side: Positive[int] = 800
    """Images are scaled so that the short side has this many pixels ..."""
    long_side: int = 1333
    """... unless the long side would then have more than this many."""
    buckets: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1344, 1344))
    """Padded sizes (height, width), multiples of 32. An image goes into the first bucket that it
    fits in, and all images of a step come from one bucket."""
    max_boxes: Positive[int] = 100
    """Boxes per image after padding. If an image has more, the smallest are dropped, which is
    reported when the run starts."""
    flip: Fraction[float] = 0.5
    """Probability of a horizontal flip in training."""
    min_short_side: int = 0
    """Multi-scale training: the short side of each image is drawn between this value (480 is
    common) and `short_side`; 0: it is always `short_side`."""
    zoom: Annotated[
        tuple[float, float],
        Bound(
            lambda zoom: 0 < zoom[0] <= zoom[1] <= 10,
            "must be a range of factors from above 0 to 10",
        ),
    ] = (1.0, 1.0)
    """Large-scale jitter in training: each image is scaled by a factor drawn from this range and,
    if it then exceeds its size without jitter, cropped to that at random; (0.1, 2.0) is common."""
    keep_empty: bool = False
    """Also train on images without an object to learn from; the published code does not."""
    on_error: Literal["error", "skip"] = "error"
    """A training image that cannot be decoded: stop and name it, or replace it by another one with
    a warning. Evaluation always stops."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """RetinaNet: ResNet, feature pyramid P3-P7, two convolutional heads."""

    backbone: str = "resnet50"
    """resnet10, 18, 34, 50, 101, 152, resnext50_32x4d, or resnext101_32x4d, _32x8d or _64x4d."""
    weights: str = ""
    """ImageNet weights that the backbone of a new run starts from: a .safetensors or .pth file, or
    hf://OWNER/NAME[/FILE] on the Hugging Face Hub; empty: random initialization."""
    width: Positive[int] = 64
    """Channels of the backbone's stem; the published networks have 64."""
    stem_kernel: Annotated[Positive[int], Bound(lambda side: side % 2 == 1, "must be odd")] = 7
    """Kernel size of the stem's convolution; 3 is cheaper, and enough for small images."""
    norm: Literal["frozen", "batch", "group"] = "frozen"
    """Backbone normalization: fixed statistics, those of the whole batch, or GroupNorm."""
    norm_epsilon: NotNegative[float] = 1e-5
    """Added to variances in the backbone; torchvision's published RetinaNet v1 needs 0."""
    frozen_stages: Annotated[int, Bound(lambda count: 0 <= count <= 4, "must be 0 to 4")] = 0
    """Stages of the backbone that are not trained: 0 none, 1 the stem and the first stage, ..., 4
    all of it. The published models have 1; it makes sense with pretrained weights only."""
    remat: bool = False
    """Keep only the inputs of the backbone's stages for the backward pass and recompute the rest:
    less memory, slower, the same results."""
    channels: Positive[int] = 256
    """Channels of the pyramid and of the heads."""
    p6_from: Literal["c5", "p5"] = "c5"
    """Input of P6: the backbone's last stage (mmdetection, torchvision v2), or the pyramid's P5
    (torchvision v1)."""
    relu_before_p7: bool = False
    """A ReLU between P6 and P7, as in torchvision; mmdetection has none."""
    head_convs: NotNegative[int] = 4
    """3x3 convolutions in each head before the last one."""
    head_norm: Literal["none", "group"] = "none"
    """Normalization in the heads."""
    prior: Annotated[float, Bound(lambda value: 0 < value < 1, "must be in (0, 1)")] = 0.01
    """Score that a newly initialized model gives to every (anchor, class) pair."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the activations; parameters, logits and losses are float32."""


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Anchor boxes and how they are matched to ground truth."""

    convention: Literal["mmdetection", "torchvision"] = "mmdetection"
    """`mmdetection`: exact sizes, and a box may claim its best anchors from other boxes.
    `torchvision`: sizes in integer pixels, and claimed anchors learn the box they overlap most. See
    `ghm_jax.detection.anchors` and `ghm_jax.detection.matching`; imported weights need the rules
    they were trained with."""
    scale: Positive[float] = 4.0
    """Side of the smallest anchor of a level, in strides of that level."""
    octaves: Positive[int] = 3
    """Sizes per level: multiples 2**(i / octaves) of the smallest."""
    ratios: Annotated[
        tuple[float, ...],
        Bound(lambda ratios: all(0 < ratio < math.inf for ratio in ratios), "must be positive"),
    ] = (0.5, 1.0, 2.0)
    """Height / width."""
    positive_iou: Fraction[float] = 0.5
    """An anchor is positive at or above this IoU ..."""
    negative_iou: Fraction[float] = 0.4
    """... background below this one, and ignored in between."""
    crowd: Literal["drop", "ignore"] = "drop"
    """Crowd regions in training: dropped, so that they count as background (as published), or
    anchors with at least half of their area in one are ignored unless they are positive."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Classification and box losses; see `ghm_jax.losses`."""

    classification: str = "ghm_c"
    """Loss of the class scores: ghm_c, focal, cross_entropy, ohem, or a function of your own as
    `module:function`, with the arguments and results of `ghm_jax.losses.focal_loss`."""
    weight: NotNegative[float] | Literal["published"] = "published"
    """Weight of the classification loss. `published`: 1, or for GHM-C over one histogram 4, which
    gives the gradient of the published code."""
    ghm_c: Harmonizing = field(default_factory=lambda: Harmonizing(min_count=100.0))
    """GHM-C: how the class scores are harmonized. The floor of 100 is that of a detector, whose
    batches hold a hundred thousand examples and more."""
    box: str = "ghm_r"
    """Loss of the box deltas of positive anchors: ghm_r, smooth_l1, asl1, or `module:function`."""
    box_weight: NotNegative[float] | Literal["published"] = "published"
    """Weight of the box loss. `published`: 10 for GHM-R with a call per level, 40 with one
    histogram, which gives the same gradient; 4 for the others, which average over the four
    coordinates of a box where the published ones add them up."""
    ghm_r: Harmonizing = field(default_factory=lambda: Harmonizing(bins=10, momentum=0.7))
    """GHM-R: how the coordinates of the boxes are harmonized."""
    mu: Positive[float] = 0.02
    """GHM-R, ASL1: error at which the authentic smooth L1 turns from quadratic to linear. 0.02 is
    published; GHM-R needs it near the errors that there are, such as 0.1 in a short training."""
    ghm_scope: Literal["batch", "level"] = "batch"
    """GHM: one histogram and mean over all pyramid levels (the paper), or one call per level with a
    shared moving histogram, the losses summed (the published code)."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer and learning-rate schedule; one step sees `batch_size` images."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    batch_size: Positive[int] = 16
    """Images per step, over all devices."""
    accumulate: Positive[int] = 1
    """Microbatches per step: each device splits its images into this many and processes one at a
    time. Less memory, but two forward passes. Losses and histograms are still those of the whole
    batch; batch normalization, if there is any, is over one microbatch."""
    steps: Positive[int] = 87_960
    """Steps of the run; 12 epochs of COCO at 16 images per step."""
    learning_rate: Positive[float] = 0.01
    """Peak learning rate, for this `batch_size`."""
    momentum: BelowOne[float] = 0.9
    """SGD only."""
    weight_decay: NotNegative[float] = 1e-4
    """L2 penalty (SGD) or decoupled decay (AdamW)."""
    clip_norm: Positive[float] = 35.0
    """Gradients with a larger global norm are scaled down to this norm."""
    warmup_steps: NotNegative[int] = 500
    """Steps over which the rate rises linearly ..."""
    warmup_factor: Fraction[float] = 1 / 3
    """... from this fraction of the peak."""
    schedule: Literal["step", "cosine"] = "step"
    """After warm-up: divide by 10 at each of `drops`, or a cosine down to zero."""
    drops: tuple[int, ...] = (58_640, 80_630)
    """Steps at which the rate is divided by 10 (epochs 8 and 11 of 12)."""
    ema: BelowOne[float] = 0.0
    """Decay of a moving average of the parameters (0.9998 is common), which is then evaluated and
    exported instead; 0: none. The first steps use a smaller decay, so that it follows quickly."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """From logits and deltas to detections; the published settings."""

    score_threshold: Fraction[float] = 0.05
    """Detections below this score are dropped."""
    candidates: Positive[int] = 1000
    """Maximum number of (anchor, class) pairs per pyramid level that enter suppression."""
    nms_iou: Fraction[float] = 0.5
    """Of two boxes of one class with an IoU above this, the one with the lower score is removed."""
    nms_classes: Literal["each", "all"] = "each"
    """Boxes suppress each other within each class (as published), or across all classes."""
    nms_sigma: NotNegative[float] = 0.0
    """Gaussian soft-NMS: the lower score is multiplied by exp(-IoU^2 / nms_sigma) instead (0.5 in
    its paper); 0: as published."""
    max_detections: Positive[int] = 100
    """Maximum number of detections per image."""
    batch_size: Positive[int] = 16
    """Images per evaluation step, over all devices."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run behaves; none of these affects its result, so a resumed run may change them."""

    wrapper: Literal["pmap", "shard_map"] = "pmap"
    """JAX transformation that runs the per-device step on all devices."""
    devices: NotNegative[int] = 0
    """Devices to use; 0: all, and on CPU as many cores as the batch can be split over."""
    workers: NotNegative[int] = 4
    """Worker processes that decode images; 0: the main process decodes them."""
    log_every: Positive[int] = 50
    """Steps between two log lines."""
    checkpoint_every: Positive[int] = 2000
    """Steps between two checkpoints."""
    keep: Positive[int] = 2
    """Number of newest checkpoints to keep ..."""
    keep_best: NotNegative[int] = 1
    """... and of evaluated checkpoints with the highest AP."""
    eval_every: NotNegative[int] = 0
    """Steps between two evaluations on the validation split during training; 0: none.
    Each one saves a checkpoint and adds a line to evaluations.jsonl."""
    max_skipped: Positive[int] = 20
    """An update with NaN or Inf in its loss or gradient is skipped; after this many consecutive
    ones, checked at each log line, the run stops."""
    wandb: bool = False
    """Also log to Weights & Biases what TensorBoard gets (pip install "ghm-jax[wandb]"); its own
    environment variables, such as WANDB_PROJECT and WANDB_MODE=offline, decide where to."""
    peak_teraflops: NotNegative[float] = 0.0
    """Peak of one device for the MFU, in 10^12 operations per second; 0: the published bfloat16
    peak of that device. If none is known, no MFU is reported."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: Annotated[NotNegative[int], Bound(lambda seed: seed < 2**32, "must be below 2**32")] = 0
    """Seed of initialization, data order and augmentation."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    anchors: Anchors = field(default_factory=Anchors)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    predict: Predict = field(default_factory=Predict)
    run: Run = field(default_factory=Run)

    def check(self, num_devices: int = 1) -> "Config":
        """Raises ConfigError for the first invalid setting; returns the config itself.

        Args:
            num_devices: devices (all hosts) that the batches are split over.
        """
        from_dict(to_dict(self))  # the types
        for error in itertools.chain(
            _out_of_bounds(self, ""),
            _broken_model_rules(self.model),
            _broken_data_rules(self.data),
            _broken_anchor_rules(self.anchors),
            _broken_loss_rules(self.loss),
            _broken_step_rules(self, num_devices),
        ):
            raise error
        return self


BACKBONES = (
    *("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
CLASSIFICATION_LOSSES = ("ghm_c", "focal", "cross_entropy", "ohem")
BOX_LOSSES = ("ghm_r", "smooth_l1", "asl1")
# A resumed run may change these: they do not affect its result.
HARMLESS = ("run.", "data.dir", "data.cache", "data.annotations", "predict.")


def _out_of_bounds(section: Any, prefix: str) -> Iterator[ConfigError]:
    """The settings whose own value is out of bounds."""
    yield from (ConfigError(prefix + name, problem) for name, problem in problems(section))
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(inner := getattr(section, f.name)):
            yield from _out_of_bounds(inner, f"{prefix}{f.name}.")


def _broken_model_rules(model: Model) -> Iterator[ConfigError]:
    if model.backbone not in BACKBONES:
        yield ConfigError(
            "model.backbone",
            f"unknown backbone {_misspelt(model.backbone, BACKBONES)}",
            f"choose one of {', '.join(BACKBONES)}",
        )
    if model.backbone.startswith("resnext") and model.width % 16:
        yield ConfigError(
            "model.width",
            f"{model.width} channels cannot be split into the groups of a ResNeXt",
            "use a multiple of 16",
        )
    if model.weights and model.norm == "group":
        yield ConfigError(
            "model.weights",
            "ImageNet weights have batch statistics, which model.norm 'group' does not use",
            "set model.norm to 'frozen' or 'batch'",
        )


def _broken_data_rules(data: Data) -> Iterator[ConfigError]:
    if not data.buckets:
        yield ConfigError("data.buckets", "needs at least one (height, width)")
    for bucket in data.buckets:
        if len(bucket) != 2 or not all(side > 0 and side % 32 == 0 for side in bucket):
            yield ConfigError(
                "data.buckets", f"{bucket} is not a (height, width) in multiples of 32"
            )
    if len(set(data.buckets)) < len(data.buckets):
        yield ConfigError("data.buckets", f"{data.buckets} has one twice", "remove it")
    largest = max(max(bucket) for bucket in data.buckets)
    if data.long_side > largest:
        yield ConfigError(
            "data.long_side",
            f"images of {data.long_side} pixels fit in none of data.buckets",
            f"lower it to {largest} or add a larger bucket",
        )
    if data.short_side > data.long_side:
        problem = f"{data.short_side} is more than data.long_side {data.long_side}"
        yield ConfigError("data.short_side", problem)
    if not 0 <= data.min_short_side <= data.short_side:
        yield ConfigError(
            "data.min_short_side",
            f"must be 0 to data.short_side {data.short_side}, got {data.min_short_side}",
        )


def _broken_anchor_rules(anchors: Anchors) -> Iterator[ConfigError]:
    if anchors.negative_iou > anchors.positive_iou:
        yield ConfigError(
            "anchors.negative_iou",
            f"{anchors.negative_iou} is above anchors.positive_iou {anchors.positive_iou}",
        )
    if not anchors.ratios:
        yield ConfigError("anchors.ratios", "needs at least one ratio")


def _broken_loss_rules(loss: Loss) -> Iterator[ConfigError]:
    for key, value, names in (
        ("loss.classification", loss.classification, CLASSIFICATION_LOSSES),
        ("loss.box", loss.box, BOX_LOSSES),
    ):
        if value not in names and not re.fullmatch(r"[\w.]+:\w+", value):
            yield ConfigError(
                key,
                f"unknown loss {_misspelt(value, names)}",
                f"choose one of {', '.join(names)}, or give a function as module:function",
            )


def _misspelt(value: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, names, 1)
    return shown(value) + (f" (did you mean {near[0]}?)" if near else "")


def _broken_step_rules(c: Config, num_devices: int) -> Iterator[ConfigError]:
    for key, size in (
        ("optimizer.batch_size", c.optimizer.batch_size),
        ("predict.batch_size", c.predict.batch_size),
    ):
        if size % num_devices:
            nearest = max(1, size // num_devices) * num_devices
            yield ConfigError(
                key,
                f"{size} images cannot be split over {num_devices} devices",
                f"use a multiple of {num_devices}, for example {nearest}",
            )
    microbatches, size = c.optimizer.accumulate, c.optimizer.batch_size
    if size % (num_devices * microbatches):
        yield ConfigError(
            "optimizer.accumulate",
            f"{size // num_devices} images per device cannot be split into {microbatches} "
            "microbatches",
            f"use a divisor, or an optimizer.batch_size that is a multiple of "
            f"{num_devices * microbatches}",
        )
    if c.optimizer.warmup_steps > c.optimizer.steps:
        yield ConfigError(
            "optimizer.warmup_steps",
            f"{c.optimizer.warmup_steps} is more than optimizer.steps {c.optimizer.steps}",
        )


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, in order."""
    return dict(_flatten(config, ""))


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flatten(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


# Settings of `loss` before there were `loss.ghm_c` and `loss.ghm_r`: old name -> new names.
_FORMERLY_IN_LOSS = {
    **{name: [f"ghm_c.{name}"] for name in ("bins", "momentum", "min_count", "strength")},
    **{f"box_{name}": [f"ghm_r.{name}"] for name in ("bins", "momentum", "min_count", "strength")},
    **{
        name: [f"ghm_c.{name}", f"ghm_r.{name}"]
        for name in ("density", "normalizer", "bias_correction")
    },
}


def unknown_key(key: str) -> ConfigError:
    """The error for a dotted name that is no setting, with the nearest ones."""
    if key == "loss.preset":
        return ConfigError(
            key,
            "no such setting",
            "the published code has bias_correction False and min_count 0 in loss.ghm_c and "
            "loss.ghm_r",
        )
    if not key.isprintable() or len(key) > 80:
        return ConfigError(shown(key), "no such setting", "see `help` for all settings")
    known = list(flatten(Config()))
    section, _, name = key.rpartition(".")
    near = difflib.get_close_matches(key, known, 3, cutoff=0.5)
    near += [k for k in known if k.split(".")[-1] == name and k not in near]
    if section == "loss" and name in _FORMERLY_IN_LOSS:
        near = [f"loss.{new}" for new in _FORMERLY_IN_LOSS[name]]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "see `help` for all settings"
    return ConfigError(key, "no such setting", hint)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`, also after a round trip through JSON; reads old runs' configs too.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    return _replaced(Config(), _with_nested_loss(values), "")


def _with_nested_loss(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings in today's form, from those of a run older than `loss.ghm_c` and `loss.ghm_r`.

    `preset` "reference" overrode four other settings; they get the values that were in effect.
    """
    loss, former = values.get("loss"), {*_FORMERLY_IN_LOSS, "preset"}
    if not isinstance(loss, Mapping) or not former & loss.keys():
        return values
    if {"ghm_c", "ghm_r"} & loss.keys():  # both forms at once: no run was saved like this
        return values
    nested: dict[str, Any] = {key: loss[key] for key in loss if key not in former}
    nested |= {"ghm_c": {}, "ghm_r": {}}
    for key, now in _FORMERLY_IN_LOSS.items():
        for ghm, name in (new.split(".") for new in now if key in loss):
            nested[ghm][name] = loss[key]
    if loss.get("preset") == "reference":
        nested["ghm_c"] |= REFERENCE
        nested["ghm_r"] |= REFERENCE
    return {**values, "loss": nested}


def _replaced(default: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """The section `default` with these values instead of its own."""
    hints = typing.get_type_hints(type(default))
    for key in values:
        if key not in hints:
            raise unknown_key(prefix + key)
    converted = {}
    for key, value in values.items():
        section = getattr(default, key)
        if dataclasses.is_dataclass(section) and isinstance(value, Mapping):
            converted[key] = _replaced(section, value, f"{prefix}{key}.")
        else:
            converted[key] = _convert(hints[key], value, prefix + key)
    return dataclasses.replace(default, **converted)


def _convert(kind: Any, value: Any, key: str) -> Any:
    kind = kind_of(kind, value)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return tuple(_convert(kinds[0], item, key) for item in value)
        if len(kinds) == len(value):
            return tuple(_convert(k, item, key) for k, item in zip(kinds, value, strict=True))
    elif typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    elif typing.get_origin(kind) is Literal:
        choices = ", ".join(map(str, typing.get_args(kind)))
        raise ConfigError(key, f"{shown(value)} is not one of {choices}")
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
        raise ConfigError(key, f"{shown(value)} is too large")
    elif kind in (int, str, bool) and type(value) is kind:  # True is not a number here
        if isinstance(value, int) and not -(2**31) <= value < _INTEGERS_BELOW.get(key, 2**31):
            raise ConfigError(key, f"{shown(value)} does not fit in 32 bits")
        if isinstance(value, str) and not _can_be_a_path(value):
            raise ConfigError(key, f"{shown(value)} is no text that a file name can hold")
        return value
    raise ConfigError(key, f"{shown(value)} is not of the type {kind}")


_INTEGERS_BELOW = {"seed": 2**32}  # the only one that is computed with unsigned


def _can_be_a_path(text: str) -> bool:
    """Whether a file could have this name; those that are no UTF-8 hold surrogates."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that affect the result and differ: {dotted name: (old, new)}."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before[key], after[key])
        for key in before
        if before[key] != after[key] and not key.startswith(HARMLESS)
    }

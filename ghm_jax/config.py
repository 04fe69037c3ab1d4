"""What decides a result, as data: frozen dataclasses, their defaults and every check.

The defaults are the published RetinaNet-R50 recipe on COCO with the package's own GHM settings.
An experiment file holds `config = Config(...)`; any field can be overridden on the command line
by its dotted name (`--loss.momentum 0.9`). Nothing here reads or writes a file.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ghm_jax.exceptions import ConfigError


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, and how they become arrays of a fixed shape."""

    name: str = "coco/2017"
    """TFDS name of the data set; empty: the only one in `dir`, whose name the run then keeps."""
    dir: str = "data"
    """Directory that holds prepared TFDS data sets (array_record)."""
    train_split: str = "train"
    """TFDS split to train on."""
    validation_split: str = "validation"
    """TFDS split to evaluate on."""
    annotations: str = ""
    """Official instances JSON of the validation split to score against; empty: the data set's own
    boxes. TFDS rounds areas down, so published figures need the official file."""
    classes: tuple[str, ...] = ()
    """Class names in label order; read from the data set when a run starts."""
    short_side: int = 800
    """Images are scaled until the short side has this many pixels ..."""
    long_side: int = 1333
    """... unless the long side would have more than this many."""
    buckets: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1344, 1344))
    """(height, width) to which images are padded: each belongs to the first one that holds it, and
    a step takes images of one bucket; multiples of 32."""
    max_boxes: int = 100
    """Boxes an image is padded to. Where an image has more, a run says so when it starts, and the
    smallest are left out."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    min_short_side: int = 0
    """Multi-scale training: the short side is drawn from here to `short_side`, for each image anew
    (480 is usual); 0: it is always `short_side`."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Large-scale jitter in training: images are scaled by a factor drawn from this range, and what
    then reaches over the size they have without it is cut off at random; (0.1, 2.0) is usual."""
    keep_empty: bool = False
    """Train on images without an object to learn from as well; the published code does not."""
    on_error: Literal["error", "skip"] = "error"
    """A training image that cannot be decoded: stop and name it, or put another one in its place
    and say so. An evaluation always stops."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """RetinaNet: ResNet, feature pyramid P3-P7, two convolutional heads."""

    backbone: str = "resnet50"
    """resnet10, 18, 34, 50, 101, 152, resnext50_32x4d, or resnext101_32x4d, _32x8d or _64x4d."""
    weights: str = ""
    """ImageNet weights that the backbone of a new run starts from: a .safetensors or .pth file, or
    hf://OWNER/NAME[/FILE] on the Hugging Face Hub; empty: random ones."""
    width: int = 64
    """Channels of the backbone's stem; the published networks have 64."""
    stem_kernel: int = 7
    """Side of the stem's convolution; 3 is cheaper, and enough for small images."""
    norm: Literal["frozen", "batch", "group"] = "frozen"
    """Backbone normalization: fixed statistics, those of the whole batch, or GroupNorm."""
    norm_epsilon: float = 1e-5
    """Added to variances in the backbone; torchvision's published RetinaNet v1 needs 0."""
    frozen_stages: int = 0
    """Backbone left as it starts: 0 nothing, 1 the stem and the first stage, ..., 4 all of it. The
    published models have 1; it makes sense with imported weights only."""
    remat: bool = False
    """Keep only the inputs of the backbone's stages for the backward pass and compute the rest
    again: less memory, slower, the same results."""
    channels: int = 256
    """Channels of the pyramid and of the heads."""
    p6_from: Literal["c5", "p5"] = "c5"
    """What P6 is made of: the backbone's last stage (mmdetection, torchvision v2), or the pyramid's
    P5 (torchvision v1)."""
    relu_before_p7: bool = False
    """A ReLU between P6 and P7, as in torchvision; mmdetection has none."""
    head_convs: int = 4
    """3x3 convolutions in each head before the last one."""
    head_norm: Literal["none", "group"] = "none"
    """Normalization in the heads."""
    prior: float = 0.01
    """Probability that a fresh model gives to every (anchor, class) pair."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the activations; parameters, logits and losses are float32."""


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Anchor boxes and how they are matched to ground truth."""

    convention: Literal["mmdetection", "torchvision"] = "mmdetection"
    """Whose rules: exact sizes, and a box may claim its best anchors from other boxes; or sizes in
    whole pixels, and claimed anchors learn the box they overlap most. See
    `ghm_jax.detection.anchors` and `ghm_jax.detection.matching`; imported weights need the rules
    they were trained with."""
    scale: float = 4.0
    """Side of the smallest anchor of a level, in strides of that level."""
    octaves: int = 3
    """Sizes per level, 2**(i / octaves) apart."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width."""
    positive_iou: float = 0.5
    """An anchor is positive from this IoU on ..."""
    negative_iou: float = 0.4
    """... background below this one, and ignored between."""
    crowd: Literal["drop", "ignore"] = "drop"
    """Crowd regions in training: left out, so that they are background (as published), or anchors
    that lie in one by half or more are ignored unless they are positive."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Classification and box losses; see `ghm_jax.losses`."""

    classification: Literal["ghm_c", "focal", "cross_entropy", "ohem"] = "ghm_c"
    """Loss of the class scores."""
    weight: float = 1.0
    """Weight of the classification loss."""
    bins: int = 30
    """GHM-C: unit regions of gradient norm."""
    momentum: float = 0.75
    """GHM-C: share of the old histogram that a step keeps."""
    min_count: float = 10.0
    """GHM-C: density floor, in examples a bin (0: as published)."""
    strength: float = 1.0
    """GHM-C: power of the density in the weights; 0 is cross-entropy."""
    box: Literal["ghm_r", "smooth_l1", "asl1"] = "ghm_r"
    """Loss of the box deltas of positive anchors."""
    box_weight: float = 10.0
    """Weight of the box loss."""
    box_bins: int = 10
    """GHM-R: unit regions of gradient norm."""
    box_momentum: float = 0.7
    """GHM-R: share of the old histogram that a step keeps."""
    box_min_count: float = 10.0
    """GHM-R: density floor, in box coordinates a bin (0: as published)."""
    box_strength: float = 1.0
    """GHM-R: power of the density in the weights; 0 is ASL1."""
    mu: float = 0.02
    """GHM-R, ASL1: where the authentic smooth L1 turns from square to linear."""
    density: Literal["histogram", "exact"] = "histogram"
    """GHM: from unit regions, averaged over steps, or exact, of each batch alone (slow)."""
    ghm_scope: Literal["batch", "level"] = "batch"
    """GHM: one histogram and mean over all pyramid levels (the paper), or a call for each level
    that shares the moving histogram, the losses added (the published code)."""
    normalizer: Literal["nonempty", "bins"] = "nonempty"
    """GHM: divide by the filled bins (the published code), or by all bins (the paper)."""
    bias_correction: bool = True
    """GHM: correct the moving histogram for its start at zero (the published code does not)."""
    preset: Literal["default", "reference"] = "default"
    """`reference`: averaging and normalization exactly as in the published code, without floors,
    whatever the settings above say; `ghm_scope` is apart."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer and learning-rate schedule; one step sees `batch_size` images."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    batch_size: int = 16
    """Images a step, over all devices."""
    accumulate: int = 1
    """Parts in which each device computes its images of a step, one after the other: less memory,
    the network runs forward twice, and losses and histograms are still those of the whole batch
    (batch normalization, if there is any, is over one part)."""
    steps: int = 87_960
    """Steps of the whole run; 12 epochs of COCO at 16 images."""
    learning_rate: float = 0.01
    """Peak learning rate, for this `batch_size`."""
    momentum: float = 0.9
    """SGD only."""
    weight_decay: float = 1e-4
    """L2 penalty (SGD) or decoupled decay (AdamW)."""
    clip_norm: float = 35.0
    """Largest global norm of the gradient."""
    warmup_steps: int = 500
    """Steps over which the rate rises linearly ..."""
    warmup_factor: float = 1 / 3
    """... from this fraction of the peak."""
    schedule: Literal["step", "cosine"] = "step"
    """After warm-up: divide by 10 at each of `drops`, or a cosine down to zero."""
    drops: tuple[int, ...] = (58_640, 80_630)
    """Steps at which the rate is divided by 10 (epochs 8 and 11 of 12)."""
    ema: float = 0.0
    """Share of the old value in a moving average of the parameters (0.9998 is usual), which is then
    what is evaluated and exported; 0: none. It starts with less, so that it follows at first."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """From logits and deltas to detections; the published settings."""

    score_threshold: float = 0.05
    """Detections below this score are dropped."""
    candidates: int = 1000
    """(anchor, class) pairs of each pyramid level that go into suppression at most."""
    nms_iou: float = 0.5
    """Of two boxes of one class that overlap more than this, the lower score goes."""
    nms_classes: Literal["each", "all"] = "each"
    """Boxes are rivals within each class (as published), or across all classes."""
    nms_sigma: float = 0.0
    """Gaussian soft-NMS: a rival's score is multiplied by exp(-IoU^2 / nms_sigma) instead (0.5 in
    its paper); 0: as published."""
    max_detections: int = 100
    """Detections an image at most."""
    batch_size: int = 16
    """Images a step of evaluation, over all devices."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run behaves; none of these decide its result, so a resumed run may change them."""

    wrapper: Literal["pmap", "shard_map"] = "pmap"
    """How the per-device step meets the devices."""
    devices: int = 0
    """Devices to use; 0: all, and on CPU as many cores as the batch can be split over."""
    workers: int = 4
    """Processes that decode images; 0: this one."""
    log_every: int = 50
    """Steps between two lines of the log."""
    checkpoint_every: int = 2000
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints kept ..."""
    keep_best: int = 1
    """... and those of highest AP, of the ones that were evaluated."""
    eval_every: int = 0
    """Steps between two evaluations on the validation split while training; 0: none.
    Each is saved as a checkpoint, and a line of evaluations.jsonl."""
    max_skipped: int = 20
    """An update whose loss or gradient is not finite is left out; after this many in a row, seen at
    a line of the log, the run stops."""
    wandb: bool = False
    """Send what TensorBoard gets to Weights & Biases too (pip install "ghm-jax[wandb]"); its own
    environment variables, such as WANDB_PROJECT and WANDB_MODE=offline, say where."""
    peak_teraflops: float = 0.0
    """Peak of one device for the MFU, in 10^12 operations a second; 0: what its maker publishes for
    bfloat16. Without either a run gives no MFU."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = 0
    """Fixes initialization, data order and augmentation."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    anchors: Anchors = field(default_factory=Anchors)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    predict: Predict = field(default_factory=Predict)
    run: Run = field(default_factory=Run)

    def check(self, num_devices: int = 1) -> "Config":
        """Raises ConfigError for the first setting that cannot work; returns the config itself.

        Args:
            num_devices: devices (all hosts) that the batches are split over.
        """
        for rule in _rules(self, num_devices):
            ok, message = rule
            if not ok:
                raise ConfigError(message)
        return self


BACKBONES = (
    *("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
# A resumed run may change these: they do not decide its result.
HARMLESS = ("run.", "data.dir", "data.annotations", "predict.")


def _rules(c: Config, num_devices: int) -> Iterator[tuple[bool, str]]:
    for key, value in flatten(c).items():
        kind = _field_type(key)
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        yield (
            not choices or value in choices,
            f"{key}: {value!r} is not one of {', '.join(map(str, choices))}",
        )
        finite = not isinstance(value, float) or math.isfinite(value)
        yield finite, f"{key}: must be a finite number, got {value}"

    near = difflib.get_close_matches(c.model.backbone, BACKBONES, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    yield (
        c.model.backbone in BACKBONES,
        f"model.backbone: unknown backbone {c.model.backbone!r}{hint}; "
        f"choose one of {', '.join(BACKBONES)}",
    )
    yield (
        not c.model.backbone.startswith("resnext") or c.model.width % 16 == 0,
        f"model.width: {c.model.width} channels cannot be split into the groups of a ResNeXt; "
        "use a multiple of 16",
    )
    yield (
        0 <= c.model.frozen_stages <= 4,
        f"model.frozen_stages: must be 0 to 4, got {c.model.frozen_stages}",
    )

    yield (
        not c.model.weights or c.model.norm != "group",
        "model.weights: ImageNet weights have batch statistics, which model.norm 'group' does not "
        "use; set model.norm to 'frozen' or 'batch'",
    )

    for key in ("optimizer.batch_size", "predict.batch_size"):
        size = flatten(c)[key]
        nearest = max(1, size // num_devices) * num_devices
        yield size > 0, f"{key}: must be positive, got {size}"
        yield (
            size % num_devices == 0,
            f"{key}: {size} images cannot be split over {num_devices} devices; "
            f"use a multiple of {num_devices}, for example {nearest}",
        )

    parts, size = c.optimizer.accumulate, c.optimizer.batch_size
    yield parts > 0, f"optimizer.accumulate: must be positive, got {parts}"
    yield (
        size % (num_devices * parts) == 0,
        f"optimizer.accumulate: {size // num_devices} images of a device cannot be split into "
        f"{parts} parts; use a divisor, or an optimizer.batch_size that is a multiple of "
        f"{num_devices * parts}",
    )

    yield bool(c.data.buckets), "data.buckets: needs at least one (height, width)"
    for bucket in c.data.buckets:
        yield (
            len(bucket) == 2 and all(side > 0 and side % 32 == 0 for side in bucket),
            f"data.buckets: {bucket} is not a (height, width) in multiples of 32",
        )
    yield (
        len(set(c.data.buckets)) == len(c.data.buckets),
        f"data.buckets: {c.data.buckets} has one twice; remove it",
    )
    largest = max(max(bucket) for bucket in c.data.buckets)
    yield (
        c.data.long_side <= largest,
        f"data.long_side: images of {c.data.long_side} pixels fit in none of data.buckets; "
        f"lower it to {largest} or add a larger bucket",
    )
    yield (
        c.data.short_side <= c.data.long_side,
        f"data.short_side: {c.data.short_side} is more than data.long_side {c.data.long_side}",
    )

    yield (
        0 <= c.data.min_short_side <= max(c.data.short_side, 0),  # which has a rule of its own
        f"data.min_short_side: must be 0 to data.short_side {c.data.short_side}, got "
        f"{c.data.min_short_side}",
    )
    yield (
        0 < c.data.zoom[0] <= c.data.zoom[1] <= 10,
        f"data.zoom: must be a range of factors from above 0 to 10, got {c.data.zoom}",
    )

    yield (
        c.anchors.negative_iou <= c.anchors.positive_iou,
        f"anchors.negative_iou: {c.anchors.negative_iou} is above anchors.positive_iou "
        f"{c.anchors.positive_iou}",
    )
    yield bool(c.anchors.ratios), "anchors.ratios: needs at least one ratio"
    yield (
        all(0 < ratio < math.inf for ratio in c.anchors.ratios),
        f"anchors.ratios: must be positive, got {c.anchors.ratios}",
    )
    yield c.anchors.scale > 0, f"anchors.scale: must be positive, got {c.anchors.scale}"

    for key in ("loss.momentum", "loss.box_momentum", "optimizer.momentum", "optimizer.ema"):
        value = flatten(c)[key]
        yield 0 <= value < 1, f"{key}: must be in [0, 1), got {value}"
    for key in (
        *("anchors.positive_iou", "anchors.negative_iou", "predict.nms_iou", "data.flip"),
        *("predict.score_threshold", "optimizer.warmup_factor"),
        *("loss.strength", "loss.box_strength"),
    ):
        value = flatten(c)[key]
        yield 0 <= value <= 1, f"{key}: must be in [0, 1], got {value}"
    for key in (
        *(
            "data.short_side",
            "data.max_boxes",
            "model.width",
            "model.stem_kernel",
            "model.channels",
            "anchors.octaves",
        ),
        *("loss.bins", "loss.box_bins", "loss.mu", "optimizer.steps", "optimizer.learning_rate"),
        *("optimizer.clip_norm", "predict.candidates", "predict.max_detections"),
        *("run.log_every", "run.checkpoint_every", "run.keep", "run.max_skipped"),
    ):
        value = flatten(c)[key]
        yield value > 0, f"{key}: must be positive, got {value}"
    for key in (
        *(
            "seed",
            "model.norm_epsilon",
            "model.head_convs",
            "loss.min_count",
            "loss.box_min_count",
            "loss.weight",
            "predict.nms_sigma",
        ),
        *("loss.box_weight", "optimizer.weight_decay", "optimizer.warmup_steps", "run.workers"),
        *("run.devices", "run.keep_best", "run.eval_every", "run.peak_teraflops"),
    ):
        value = flatten(c)[key]
        yield value >= 0, f"{key}: must not be negative, got {value}"
    yield (
        c.model.stem_kernel % 2 == 1,
        f"model.stem_kernel: must be odd, got {c.model.stem_kernel}",
    )
    yield c.seed < 2**32, f"seed: must be below 2**32, got {c.seed}"
    yield 0 < c.model.prior < 1, f"model.prior: must be in (0, 1), got {c.model.prior}"
    yield (
        c.optimizer.warmup_steps <= c.optimizer.steps,
        f"optimizer.warmup_steps: {c.optimizer.warmup_steps} is more than optimizer.steps "
        f"{c.optimizer.steps}",
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


def _field_type(key: str) -> Any:
    cls: Any = Config
    for part in key.split("."):
        cls = typing.get_type_hints(cls)[part]
    return cls


def unknown_key(key: str) -> str:
    """The one-line message for a dotted name that is no setting, with the nearest ones."""
    known = list(flatten(Config()))
    near = difflib.get_close_matches(key, known, 3, cutoff=0.5)
    near += [k for k in known if k.split(".")[-1] == key.split(".")[-1] and k not in near]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "see --help for all settings"
    return f"{key}: no such setting; {hint}"


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config that `to_dict` gave, also after a trip through JSON.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    return _from_dict(Config, values, "")


def _from_dict(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_key(prefix + key))
    return cls(**{key: _convert(hints[key], values[key], prefix + key) for key in values})


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _from_dict(kind, value, key + ".")
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return tuple(_convert(kinds[0], item, key) for item in value)
        if len(kinds) == len(value):
            return tuple(_convert(k, item, key) for k, item in zip(kinds, value, strict=True))
    elif typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:  # True is no number here
        return value
    raise ConfigError(f"{key}: {value!r} is not of the type {kind}")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that decide a result and differ: {dotted name: (old, new)}."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before[key], after[key])
        for key in before
        if before[key] != after[key] and not key.startswith(HARMLESS)
    }

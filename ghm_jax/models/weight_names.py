"""How published weights name the modules of a RetinaNet: one table per source, ours -> theirs.

Each entry is a module with weights of its own. Our name is its path in the variables without Flax's
inner names: `backbone/stage1_block1/conv1`. Theirs is the prefix of its tensors: `layer1.0.conv1`.
The tables cover as many stages, blocks and layers as any published network has; smaller networks
use a subset.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_BLOCKS = 36  # of ResNet-152's third stage
MAX_HEAD_CONVS = 4


@dataclass(frozen=True, eq=False)
class Naming:
    """The names of one source."""

    title: str
    """What the source is called in messages."""
    marker: str
    """A tensor that every file of this source has and no file of any other."""
    modules: dict[str, str]
    """Prefix of the tensors of each of our modules."""
    ignored: str
    """Regular expression of tensors that do not belong to the network."""

    def tensor(self, path: tuple[str, ...]) -> str | None:
        """Name of the tensor for a leaf of our variables; None if the source has no such module.

        Args:
            path: without the collection, such as ("fpn", "lateral3", "kernel").
        """
        *module, leaf = (name for name in path if not re.fullmatch(r"(Conv|BatchNorm)_0", name))
        prefix = self.modules.get("/".join(module))
        return None if prefix is None else f"{prefix}.{_LEAVES[leaf]}"

    def is_ignored(self, tensor: str) -> bool:
        """Whether a tensor is skipped on purpose."""
        return re.fullmatch(self.ignored, tensor) is not None


_LEAVES = {
    "kernel": "weight",  # of a convolution: [height, width, in, out]; theirs [out, in, h, w]
    "scale": "weight",  # of a normalization
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _resnet(prefix: str) -> dict[str, str]:
    """torchvision's names of a ResNet's modules, shared by timm and mmdetection."""
    names = {"backbone/stem_conv": f"{prefix}conv1", "backbone/stem_norm": f"{prefix}bn1"}
    for stage in range(1, 5):
        for block in range(MAX_BLOCKS):
            ours, theirs = f"backbone/stage{stage}_block{block + 1}", f"layer{stage}.{block}"
            for i in range(1, 4):
                names[f"{ours}/conv{i}"] = f"{prefix}{theirs}.conv{i}"
                names[f"{ours}/norm{i}"] = f"{prefix}{theirs}.bn{i}"
            names[f"{ours}/conv_shortcut"] = f"{prefix}{theirs}.downsample.0"
            names[f"{ours}/norm_shortcut"] = f"{prefix}{theirs}.downsample.1"
    return names


def _pyramid(lateral: str, output: str, p6: str, p7: str) -> dict[str, str]:
    """Names of the pyramid's modules; {} stands for 0 (C3, P3), 1 and 2."""
    names = {"fpn/p6": p6, "fpn/p7": p7}
    for i in range(3):
        names[f"fpn/lateral{i + 3}"] = lateral.format(i)
        names[f"fpn/output{i + 3}"] = output.format(i)
    return names


def _head(ours: str, output: str, conv: str, norm: str = "", step: int = 1) -> dict[str, str]:
    """Names of a head's modules; {} stands for 0, `step`, 2 * `step` ..."""
    names = {f"{ours}/output": output}
    for i in range(MAX_HEAD_CONVS):
        names[f"{ours}/conv{i + 1}"] = conv.format(i * step)
        if norm:
            names[f"{ours}/norm{i + 1}"] = norm.format(i * step)
    return names


_CLASS = "head.classification_head"
_BOX = "head.regression_head"
_COUNTER = r".*\.num_batches_tracked"  # step counter of PyTorch's BatchNorm, not used here

BACKBONE = Naming(
    title="an ImageNet classifier of torchvision or timm",
    marker="conv1.weight",
    modules=_resnet(""),
    ignored=rf"fc\.(weight|bias)|{_COUNTER}",
)

TORCHVISION = Naming(
    title="a RetinaNet of torchvision",
    marker="backbone.fpn.inner_blocks.0.0.weight",
    modules={
        **_resnet("backbone.body."),
        **_pyramid(
            "backbone.fpn.inner_blocks.{}.0",
            "backbone.fpn.layer_blocks.{}.0",
            "backbone.fpn.extra_blocks.p6",
            "backbone.fpn.extra_blocks.p7",
        ),
        **_head(
            "class_head", f"{_CLASS}.cls_logits", f"{_CLASS}.conv.{{}}.0", f"{_CLASS}.conv.{{}}.1"
        ),
        **_head("box_head", f"{_BOX}.bbox_reg", f"{_BOX}.conv.{{}}.0", f"{_BOX}.conv.{{}}.1"),
    },
    ignored=_COUNTER,
)

# The published RetinaNet v1 was saved in 2020, when convolution and ReLU were numbered separately.
TORCHVISION_2020 = Naming(
    title="a RetinaNet of torchvision before 0.13",
    marker="backbone.fpn.inner_blocks.0.weight",
    modules={
        **_resnet("backbone.body."),
        **_pyramid(
            "backbone.fpn.inner_blocks.{}",
            "backbone.fpn.layer_blocks.{}",
            "backbone.fpn.extra_blocks.p6",
            "backbone.fpn.extra_blocks.p7",
        ),
        **_head("class_head", f"{_CLASS}.cls_logits", f"{_CLASS}.conv.{{}}", step=2),
        **_head("box_head", f"{_BOX}.bbox_reg", f"{_BOX}.conv.{{}}", step=2),
    },
    ignored=_COUNTER,
)

MMDETECTION = Naming(
    title="a RetinaNet of mmdetection",
    marker="neck.lateral_convs.0.conv.weight",
    modules={
        **_resnet("backbone."),
        **_pyramid(
            "neck.lateral_convs.{}.conv",
            "neck.fpn_convs.{}.conv",
            "neck.fpn_convs.3.conv",
            "neck.fpn_convs.4.conv",
        ),
        **_head(
            "class_head",
            "bbox_head.retina_cls",
            "bbox_head.cls_convs.{}.conv",
            "bbox_head.cls_convs.{}.gn",
        ),
        **_head(
            "box_head",
            "bbox_head.retina_reg",
            "bbox_head.reg_convs.{}.conv",
            "bbox_head.reg_convs.{}.gn",
        ),
    },
    # There, GHM's losses are modules with bin edges and moving-average counts as buffers.
    ignored=rf"bbox_head\.loss_(cls|bbox)\.(edges|acc_sum)|{_COUNTER}",
)

DETECTORS = (TORCHVISION, TORCHVISION_2020, MMDETECTION)


def find_naming(tensors: Iterable[str], namings: Iterable[Naming]) -> Naming | None:
    """The naming whose marker is among the names of tensors."""
    present = set(tensors)
    return next((naming for naming in namings if naming.marker in present), None)

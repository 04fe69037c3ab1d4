"""RetinaNet: the network from images to logits and box deltas.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 4.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghm_jax.models.fpn import FPN
from ghm_jax.models.heads import Head, prior_bias
from ghm_jax.models.resnet import NormKind, ResNet


class RetinaNet(nn.Module):
    """Normalized images f32[B, H, W, 3] -> (logits, box deltas), each a tuple with one array per
    pyramid level, P3 first: f32[B, A_l, K] and f32[B, A_l, 4].

    The anchors are in the order of `ghm_jax.detection.anchors.make_anchors`. Batch statistics
    are taken over the replica axis `axis_name`. Activations are in `dtype`, parameters in float32.
    """

    num_classes: int
    anchors_per_cell: int
    backbone_name: str = "resnet50"
    width: int = 64
    stem_kernel: int = 7
    norm: NormKind = "frozen"
    norm_epsilon: float = 1e-5
    frozen_stages: int = 0
    remat: bool = False
    channels: int = 256
    p6_from: Literal["c5", "p5"] = "c5"
    relu_before_p7: bool = False
    head_convs: int = 4
    head_norm: Literal["none", "group"] = "none"
    prior: float = 0.01
    axis_name: str | None = None
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.backbone = ResNet(
            architecture=self.backbone_name,
            width=self.width,
            stem_kernel=self.stem_kernel,
            norm=self.norm,
            axis_name=self.axis_name,
            dtype=self.dtype,
            frozen_stages=self.frozen_stages,
            remat=self.remat,
            norm_epsilon=self.norm_epsilon,
        )
        self.fpn = FPN(
            channels=self.channels,
            dtype=self.dtype,
            p6_from=self.p6_from,
            relu_before_p7=self.relu_before_p7,
        )

        def head(outputs: int, bias: float) -> Head:
            return Head(
                anchors=self.anchors_per_cell,
                outputs=outputs,
                channels=self.channels,
                depth=self.head_convs,
                norm=self.head_norm,
                bias=bias,
                dtype=self.dtype,
            )

        self.class_head = head(self.num_classes, prior_bias(self.prior))
        self.box_head = head(4, 0.0)

    def __call__(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        levels = self.fpn(self.backbone(images.astype(self.dtype), train=train))
        logits = tuple(self.class_head(level) for level in levels)
        deltas = tuple(self.box_head(level) for level in levels)
        return logits, deltas

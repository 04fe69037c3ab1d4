"""ResNet as torchvision has it: stride in the 3x3 convolution, explicit padding.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

DEPTHS: dict[str, tuple[bool, tuple[int, ...]]] = {
    # name: (bottleneck blocks?, blocks per stage)
    "resnet10": (False, (1, 1, 1, 1)),  # not in the paper: for small data on a CPU
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}

NormKind = Literal["frozen", "batch", "group"]


class Norm(nn.Module):
    """The backbone's normalization: [..., C] -> [..., C].

    kind: "frozen" uses stored statistics and never changes them (the affine part is trained, as in
    the published recipes); "batch" uses the batch's, over all replicas of `axis_name`; "group" is
    GroupNorm with 32 groups, or fewer where a group would have less than two channels.
    """

    kind: NormKind
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.kind == "group":
            return nn.GroupNorm(num_groups_for(x.shape[-1]), epsilon=1e-5, dtype=self.dtype)(x)
        running = self.kind == "frozen" or not train
        return nn.BatchNorm(
            use_running_average=running,
            momentum=0.9,
            epsilon=1e-5,
            axis_name=None if running else self.axis_name,
            dtype=self.dtype,
        )(x)


def num_groups_for(channels: int) -> int:
    """Groups of a GroupNorm: 32, or fewer where a group would have less than two channels."""
    return min(32, max(1, channels // 2))


class Conv(nn.Module):
    """Convolution without bias, padded by half its kernel on each side as PyTorch does."""

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Conv(
            self.features,
            (self.size, self.size),
            self.stride,
            padding=self.size // 2,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
        )(x)


class Block(nn.Module):
    """A residual block, basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 to four times the width)."""

    features: int
    stride: int
    bottleneck: bool
    norm: NormKind
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(Norm, self.norm, self.axis_name, self.dtype)
        out = self.features * (4 if self.bottleneck else 1)
        # (features, kernel size, stride) of the convolutions of the residual branch
        branch = [(self.features, 3, self.stride), (out, 3, 1)]
        if self.bottleneck:
            branch = [(self.features, 1, 1), (self.features, 3, self.stride), (out, 1, 1)]

        y = x
        for i, (features, size, stride) in enumerate(branch, 1):
            y = conv(features, size, stride, name=f"conv{i}")(y)
            y = norm(name=f"norm{i}")(y, train=train)
            if i < len(branch):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = conv(out, 1, self.stride, name="conv_shortcut")(x)
            x = norm(name="norm_shortcut")(x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images [B, H, W, 3] -> (C3, C4, C5), features at strides 8, 16 and 32."""

    name_of: str
    width: int
    stem_kernel: int
    norm: NormKind
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, ...]:
        bottleneck, depths = DEPTHS[self.name_of]
        x = Conv(self.width, self.stem_kernel, 2, self.dtype, name="stem_conv")(images)
        x = Norm(self.norm, self.axis_name, self.dtype, name="stem_norm")(x, train=train)
        padding: Any = ((1, 1), (1, 1))
        x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding=padding)
        features = []
        for stage, depth in enumerate(depths):
            for i in range(depth):
                x = Block(
                    features=self.width * 2**stage,
                    stride=2 if i == 0 and stage > 0 else 1,
                    bottleneck=bottleneck,
                    norm=self.norm,
                    axis_name=self.axis_name,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x, train=train)
            features.append(x)
        return tuple(features[1:])

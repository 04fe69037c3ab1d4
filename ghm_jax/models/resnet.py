"""ResNet and ResNeXt as in torchvision: stride in the 3x3 convolution, explicit padding.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; Xie et al.,
"Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, table 1.
"""

import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghm_jax.models.convolution import convolve


class Architecture(NamedTuple):
    """What distinguishes the backbones."""

    bottleneck: bool
    """Bottleneck blocks (1x1, 3x3, 1x1) or basic ones (3x3, 3x3)."""
    depths: tuple[int, ...]
    """Blocks in each of the four stages."""
    groups: int = 1
    """Groups of the 3x3 convolutions of bottleneck blocks: ResNeXt's cardinality ..."""
    group_width: int = 64
    """... and the channels per group in the first stage, for a stem of 64 channels."""


ARCHITECTURES = {
    "resnet10": Architecture(False, (1, 1, 1, 1)),  # not published: for small data on a CPU
    "resnet18": Architecture(False, (2, 2, 2, 2)),
    "resnet34": Architecture(False, (3, 4, 6, 3)),
    "resnet50": Architecture(True, (3, 4, 6, 3)),
    "resnet101": Architecture(True, (3, 4, 23, 3)),
    "resnet152": Architecture(True, (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(True, (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": Architecture(True, (3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": Architecture(True, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Architecture(True, (3, 4, 23, 3), 64, 4),
}

NormKind = Literal["frozen", "batch", "group"]


class Norm(nn.Module):
    """The backbone's normalization, [..., C] -> [..., C], where it depends on the activations.

    kind: "batch" is BatchNorm over all replicas of `axis_name`; "group" is GroupNorm, see
    `num_groups_for`.
    epsilon: added to the variance.
    """

    kind: NormKind
    axis_name: str | None = None
    dtype: Any = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "group":
            groups = num_groups_for(x.shape[-1])
            return nn.GroupNorm(groups, epsilon=self.epsilon, dtype=self.dtype)(x)
        return nn.BatchNorm(
            use_running_average=False,
            momentum=0.9,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )(x)


def num_groups_for(channels: int) -> int:
    """Groups of a GroupNorm: 32, or fewer where a group would have fewer than two channels."""
    return min(32, max(1, channels // 2))


class Affine(NamedTuple):
    """`x * factor + offset` for each channel, f32[C] each."""

    factor: jax.Array
    offset: jax.Array


class _Stored(nn.Module):
    """What BatchNorm with stored statistics does; has the variables of `nn.BatchNorm`."""

    features: int
    epsilon: float

    @nn.compact
    def __call__(self) -> Affine:
        shape = (self.features,)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32).value
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32).value
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return Affine(factor, bias - mean * factor)


class StoredNorm(nn.Module):
    """BatchNorm with stored statistics, before it is folded into a convolution."""

    features: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self) -> Affine:
        return _Stored(self.features, self.epsilon, name="BatchNorm_0")()


class _Convolution(nn.Module):
    """Has the variables of `nn.Conv`."""

    features: int
    size: int
    stride: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, affine: Affine | None) -> jax.Array:
        shape = self.size, self.size, x.shape[-1] // self.groups, self.features
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, shape, jnp.float32)
        if affine is not None:
            kernel = kernel * affine.factor[None, None, None]
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = convolve(x, kernel, self.stride, self.groups)
        if affine is None:
            return y
        return (y.astype(jnp.float32) + affine.offset[None, None, None]).astype(self.dtype)


class Conv(nn.Module):
    """Convolution without bias, padded by half its kernel on each side as in PyTorch.

    An `affine` that follows is folded into the kernel. It costs nothing then, and its gradient is
    that of the kernel, times the kernel: no activation is kept for it.
    """

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, affine: Affine | None = None) -> jax.Array:
        convolution = _Convolution(
            self.features, self.size, self.stride, self.groups, self.dtype, name="Conv_0"
        )
        return convolution(x, affine)


class Normalization(NamedTuple):
    """How the convolutions of a backbone are normalized; called inside of a Flax module."""

    kind: NormKind
    """"frozen" is BatchNorm with fixed stored statistics (scale and bias are trained, as in the
    published recipes); for the others see `Norm`."""
    axis_name: str | None
    dtype: Any
    epsilon: float

    def __call__(self, conv: Conv, name: str, x: jax.Array, *, train: bool) -> jax.Array:
        """`conv` of x, normalized by a module of that name."""
        if self.kind == "frozen" or (self.kind == "batch" and not train):
            return conv(x, StoredNorm(conv.features, self.epsilon, name=name)())
        return Norm(*self, name=name)(conv(x))


class Block(nn.Module):
    """A residual block, basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1).

    [B, H, W, C] -> [B, H / stride, W / stride, out], where out is `features`, or four times that
    for bottleneck blocks.
    """

    architecture: Architecture
    features: int
    stride: int
    norm: Normalization

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(Conv, dtype=self.norm.dtype)
        bottleneck, _, groups, group_width = self.architecture
        out = self.features * (4 if bottleneck else 1)
        # (features, kernel size, stride, groups) of the convolutions of the residual branch
        branch = [(self.features, 3, self.stride, 1), (out, 3, 1, 1)]
        if bottleneck:
            inner = self.features * group_width // 64 * groups
            branch = [(inner, 1, 1, 1), (inner, 3, self.stride, groups), (out, 1, 1, 1)]

        y = x
        for i, (features, size, stride, groups) in enumerate(branch, 1):
            of_branch = conv(features, size, stride, groups, name=f"conv{i}")
            y = self.norm(of_branch, f"norm{i}", y, train=train)
            if i < len(branch):
                y = nn.relu(y)
        if x.shape != y.shape:
            shortcut = conv(out, 1, self.stride, name="conv_shortcut")
            x = self.norm(shortcut, "norm_shortcut", x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images [B, H, W, 3] -> (C3, C4, C5), features at strides 8, 16 and 32.

    The stem (if `frozen_stages` is not 0) and the first `frozen_stages` stages are frozen: no
    gradient reaches them and their norms use stored statistics. The optimizer must leave their
    parameters unchanged too (weight decay); `is_frozen` says which they are.

    With `remat` the backward pass recomputes each stage from its input instead of storing its
    activations: less memory, about a third more time, the same results.
    """

    architecture: str
    """One of `ARCHITECTURES`."""
    width: int
    stem_kernel: int
    norm: NormKind
    axis_name: str | None = None
    dtype: Any = jnp.float32
    frozen_stages: int = 0
    remat: bool = False
    norm_epsilon: float = 1e-5

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, ...]:
        apply = nn.remat(ResNet._stage, static_argnums=(2, 3)) if self.remat else ResNet._stage
        x, features = images, []
        for stage in range(1 + len(ARCHITECTURES[self.architecture].depths)):
            frozen = self.frozen_stages >= max(stage, 1)
            x = apply(self, x, stage, train and not frozen)
            if frozen:
                x = jax.lax.stop_gradient(x)
            features.append(x)
        return tuple(features[2:])

    def _stage(self, x: jax.Array, stage: int, train: bool) -> jax.Array:
        """The stem (stage 0) or one of the stages 1 to 4."""
        norm = Normalization(self.norm, self.axis_name, self.dtype, self.norm_epsilon)
        if stage == 0:
            conv = Conv(self.width, self.stem_kernel, 2, dtype=self.dtype, name="stem_conv")
            x = norm(conv, "stem_norm", x, train=train)
            padding: Any = ((1, 1), (1, 1))
            return nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding=padding)
        architecture = ARCHITECTURES[self.architecture]
        for i in range(architecture.depths[stage - 1]):
            x = Block(
                architecture,
                features=self.width * 2 ** (stage - 1),
                stride=2 if i == 0 and stage > 1 else 1,
                norm=norm,
                name=f"stage{stage}_block{i + 1}",
            )(x, train=train)
        return x


def is_frozen(name: str, frozen_stages: int) -> bool:
    """Whether a module of the backbone is frozen, by its name among the parameters."""
    stage = 1 if name.startswith("stem_") else int(name.removeprefix("stage").split("_")[0])
    return stage <= frozen_stages

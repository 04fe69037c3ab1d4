"""Feature pyramid P3 to P7.

Source: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017. P6 and P7 are 3x3
convolutions of stride 2; implementations differ:

- mmdetection, including the published GHM models: P6 from C5, no ReLU;
- torchvision: ReLU before P7; P6 from P5 in the first version, from C5 in `v2`.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghm_jax.models.convolution import convolve


class Lateral(nn.Module):
    """A 1x1 convolution with bias, [B, H, W, C] -> [B, H, W, channels]; has the variables of
    `nn.Conv`."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.xavier_uniform()
        kernel = self.param("kernel", init, (1, 1, x.shape[-1], self.channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype)[None, None, None]


class FPN(nn.Module):
    """(C3, C4, C5) -> (P3, P4, P5, P6, P7), each with `channels` channels, strides 8 to 128."""

    channels: int
    dtype: Any = jnp.float32
    p6_from: Literal["c5", "p5"] = "c5"
    relu_before_p7: bool = False

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        def conv(name: str, stride: int, x: jax.Array) -> jax.Array:
            return nn.Conv(
                self.channels,
                (3, 3),
                stride,
                padding=1,
                kernel_init=nn.initializers.xavier_uniform(),
                dtype=self.dtype,
                name=name,
            )(x)

        merged = [
            Lateral(self.channels, self.dtype, name=f"lateral{i}")(x)
            for i, x in enumerate(features, 3)
        ]
        for i in reversed(range(len(merged) - 1)):
            _, height, width, _ = merged[i].shape
            merged[i] = merged[i] + upsample_nearest(merged[i + 1], (height, width))
        levels = [conv(f"output{i}", 1, x) for i, x in enumerate(merged, 3)]
        p6 = conv("p6", 2, features[-1] if self.p6_from == "c5" else levels[-1])
        p7 = conv("p7", 2, nn.relu(p6) if self.relu_before_p7 else p6)
        return (*levels, p6, p7)


def upsample_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] -> [B, *size, C], each cell repeated: the inverse of halving and rounding up.

    `size` is 2H or 2H - 1, and 2W or 2W - 1; for these, PyTorch's "nearest" picks the same cells.
    """
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    return x[:, : size[0], : size[1]]

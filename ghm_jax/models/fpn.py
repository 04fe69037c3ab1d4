"""Feature pyramid P3 to P7.

Source: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017; P6 and P7 as in
the published GHM models: 3x3 convolutions of stride 2 from C5, no ReLU between.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class FPN(nn.Module):
    """(C3, C4, C5) -> (P3, P4, P5, P6, P7), each with `channels` channels, strides 8 to 128."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        def conv(name: str, size: int, stride: int, x: jax.Array) -> jax.Array:
            return nn.Conv(
                self.channels,
                (size, size),
                stride,
                padding=size // 2,
                kernel_init=nn.initializers.xavier_uniform(),
                dtype=self.dtype,
                name=name,
            )(x)

        merged = [conv(f"lateral{i}", 1, 1, x) for i, x in enumerate(features, 3)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + upsample_nearest(merged[i + 1])
        levels = [conv(f"output{i}", 3, 1, x) for i, x in enumerate(merged, 3)]
        levels.append(conv("p6", 3, 2, features[-1]))
        levels.append(conv("p7", 3, 2, levels[-1]))
        return tuple(levels)


def upsample_nearest(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], every cell repeated."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)

"""The two heads of RetinaNet, shared by all pyramid levels."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghm_jax.models.resnet import num_groups_for


class Head(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then one to `outputs` values per anchor.

    [B, H, W, C] -> f32[B, H * W * anchors, outputs]. The last bias is initialized to `bias`.
    """

    anchors: int
    outputs: int
    channels: int
    depth: int
    norm: Literal["none", "group"]
    bias: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.01)
        for i in range(self.depth):
            x = nn.Conv(
                self.channels,
                (3, 3),
                padding=1,
                use_bias=self.norm == "none",
                kernel_init=init if self.norm == "none" else nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"conv{i + 1}",
            )(x)
            if self.norm == "group":
                groups = num_groups_for(self.channels)
                x = nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=f"norm{i + 1}")(x)
            x = nn.relu(x)
        x = nn.Conv(
            self.anchors * self.outputs,
            (3, 3),
            padding=1,
            kernel_init=init,
            bias_init=nn.initializers.constant(self.bias),
            dtype=self.dtype,
            name="output",
        )(x)
        # Without the barrier, TPUs compute the losses in the blocks of this convolution, padded,
        # copied and in float32: twenty times their traffic.
        x = jax.lax.optimization_barrier(x.reshape(x.shape[0], -1, self.outputs))
        return x.astype(jnp.float32)


def prior_bias(probability: float) -> float:
    """The logit of a probability, so that the initial scores are low: sigmoid(-4.595) = 0.01."""
    return math.log(probability / (1.0 - probability))

"""Convolution of feature maps, padded as in PyTorch."""

import jax


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """Convolution with padding by half the kernel on each side.

    [B, H, W, C], [size, size, C / groups, O] -> [B, ceil(H / stride), ceil(W / stride), O], size
    odd.
    """
    size = kernel.shape[0]
    if size == 1 and groups == 1:
        # On CPUs, XLA's gradient of the kernel of such a convolution takes up to seven times as
        # long as that of a matrix product.
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )

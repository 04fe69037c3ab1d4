"""Arrays over all anchors and their parts by pyramid level."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Levels = tuple[jax.Array, ...]
"""One array [b, A_l, ...] per pyramid level, P3 first; the A_l add up to the A anchors."""


def split_levels(values: jax.Array, sizes: Sequence[int]) -> Levels:
    """[b, A, ...] to parts of these sizes."""
    levels, start = [], 0
    for size in sizes:
        levels.append(values[:, start : start + size])
        start += size
    return tuple(levels)


def join_levels(levels: Sequence[Any]) -> jax.Array:
    """The opposite: [b, A, ...]."""
    return jnp.concatenate(levels, axis=1)

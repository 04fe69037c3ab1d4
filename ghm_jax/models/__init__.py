"""The network: the only part of the package that uses Flax."""

from ghm_jax.models.retinanet import RetinaNet

__all__ = ["RetinaNet"]

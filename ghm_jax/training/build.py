"""From a config to what trains: the network, the optimizer, the state and the step."""

import jax.numpy as jnp

from ghm_jax.config import Config
from ghm_jax.models import RetinaNet


def make_model(config: Config, num_classes: int, axis_name: str | None = None) -> RetinaNet:
    """The network a config describes; batch statistics are taken over `axis_name`."""
    model = config.model
    return RetinaNet(
        num_classes=num_classes,
        anchors_per_cell=config.anchors.octaves * len(config.anchors.ratios),
        backbone_name=model.backbone,
        width=model.width,
        stem_kernel=model.stem_kernel,
        norm=model.norm,
        norm_epsilon=model.norm_epsilon,
        frozen_stages=model.frozen_stages,
        remat=model.remat,
        channels=model.channels,
        p6_from=model.p6_from,
        relu_before_p7=model.relu_before_p7,
        head_convs=model.head_convs,
        head_norm=model.head_norm,
        prior=model.prior,
        axis_name=axis_name,
        dtype=jnp.dtype(model.dtype),
    )

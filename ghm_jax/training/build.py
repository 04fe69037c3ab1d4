"""Builds what a config describes: the network, the optimizer, the state and the step."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ghm_jax.batch import Batch
from ghm_jax.config import Config
from ghm_jax.detection.loss import loss_functions
from ghm_jax.models import RetinaNet
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.state import TrainState, init_state
from ghm_jax.training.step import train_step


@dataclass(frozen=True)
class Trainer:
    """What a config trains, and how. Nothing is computed until a method is called."""

    config: Config
    model: RetinaNet
    optimizer: optax.GradientTransformation
    axis_name: str | None

    def check_losses(self) -> None:
        """Raises ConfigError for a loss of the user's own that cannot be imported."""
        loss_functions(self.config.loss)

    def init_state(self, pretrained: Mapping[str, Any] | None = None) -> TrainState:
        """The state before the first step; see `ghm_jax.training.state.init_state`. To be jitted.

        Args:
            pretrained: `params` and `batch_stats` of the modules, such as `backbone`, that do not
                start from random values.
        """
        return init_state(self.config, self.model, self.optimizer, pretrained)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The shapes and dtypes of the state, as ShapeDtypeStructs."""
        return jax.eval_shape(self.init_state)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One step of one replica; see `ghm_jax.training.step.train_step`."""
        return train_step(
            state,
            batch,
            config=self.config,
            model=self.model,
            optimizer=self.optimizer,
            axis_name=self.axis_name,
        )


def build(config: Config, num_classes: int, axis_name: str | None = None) -> Trainer:
    """Builds what a config describes; the only place that does.

    Args:
        config: network, loss and optimizer.
        num_classes: of the data set.
        axis_name: replica axis that the step and batch statistics reduce over; None: one device.
    """
    model = make_model(config, num_classes, axis_name)
    return Trainer(config, model, make_optimizer(config), axis_name)


def make_model(config: Config, num_classes: int, axis_name: str | None = None) -> RetinaNet:
    """The network of a config; batch statistics are taken over `axis_name`."""
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

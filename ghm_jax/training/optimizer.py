"""The optimizer and its learning rate, from optax."""

import functools
from typing import Any

import jax
import optax

from ghm_jax.config import Config, Optimizer
from ghm_jax.models.resnet import is_frozen


def learning_rate(settings: Optimizer) -> optax.Schedule:
    """Linear warm-up, then steps down or a cosine: step i32[] -> rate f32[]."""
    peak = settings.learning_rate
    if settings.schedule == "step":
        after = optax.piecewise_constant_schedule(
            peak, {drop - settings.warmup_steps: 0.1 for drop in settings.drops}
        )
    else:
        after = optax.cosine_decay_schedule(peak, max(1, settings.steps - settings.warmup_steps))
    if settings.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(peak * settings.warmup_factor, peak, settings.warmup_steps)
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then SGD with L2 penalty or AdamW (decay on kernels only).

    Frozen stages of the backbone (`model.frozen_stages`) get zero updates, without decay, and take
    no space in the optimizer state.
    """
    settings = config.optimizer
    rate = learning_rate(settings)
    if settings.name == "sgd":
        update = optax.chain(
            optax.add_decayed_weights(settings.weight_decay),
            optax.sgd(rate, momentum=settings.momentum),
        )
    else:
        update = optax.adamw(rate, weight_decay=settings.weight_decay, mask=_kernels)
    update = optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)
    if config.model.frozen_stages == 0:
        return update
    frozen = functools.partial(frozen_parameters, frozen_stages=config.model.frozen_stages)
    return optax.partition({True: optax.set_to_zero(), False: update}, frozen)


def frozen_parameters(params: optax.Params, frozen_stages: int) -> optax.Params:
    """For each of RetinaNet's parameters, whether it is in a frozen stage: a tree of bool."""

    def frozen(path: tuple[Any, ...], _: Any) -> bool:
        return path[0].key == "backbone" and is_frozen(path[1].key, frozen_stages)

    return jax.tree.map_with_path(frozen, params)


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)

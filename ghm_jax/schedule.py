"""The optimizer and its learning rate, from optax."""

import jax
import optax

from ghm_jax.config import Optimizer


def learning_rate(config: Optimizer) -> optax.Schedule:
    """Linear warm-up, then steps down or a cosine: step i32[] -> rate f32[]."""
    peak = config.learning_rate
    if config.schedule == "step":
        after = optax.piecewise_constant_schedule(
            peak, {drop - config.warmup_steps: 0.1 for drop in config.drops}
        )
    else:
        after = optax.cosine_decay_schedule(peak, max(1, config.steps - config.warmup_steps))
    if config.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(peak * config.warmup_factor, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: Optimizer) -> optax.GradientTransformation:
    """Clipping by global norm, then SGD with L2 penalty or AdamW (decay on kernels only)."""
    rate = learning_rate(config)
    if config.name == "sgd":
        update = optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(rate, momentum=config.momentum),
        )
    else:
        update = optax.adamw(rate, weight_decay=config.weight_decay, mask=_kernels)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)

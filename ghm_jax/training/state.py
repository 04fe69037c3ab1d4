"""The train state: everything that training changes, as one pytree."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghm_jax.config import Config
from ghm_jax.detection.loss import GHMStates, init_ghm_states
from ghm_jax.models import RetinaNet


class Skipped(NamedTuple):
    """Updates that were skipped because the loss or the gradient was not finite."""

    total: jax.Array
    """i32[]. Since the first step."""
    in_a_row: jax.Array
    """i32[]. Consecutive ones up to this step; 0 if it was finite."""


class TrainState(NamedTuple):
    """Everything that training changes; one pytree, and what a checkpoint holds."""

    step: jax.Array
    """i32[], steps done."""
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ghm: GHMStates
    ema_params: Any
    """Moving average of `params` to predict with; None without `optimizer.ema`."""
    skipped: Skipped

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated, exported and used to predict."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def init_state(
    config: Config,
    model: RetinaNet,
    optimizer: optax.GradientTransformation,
    pretrained: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step. To be jitted: the network runs.

    Args:
        config: its `seed` determines the random values.
        model, optimizer: static, not traced.
        pretrained: `params` and `batch_stats` of the modules, such as `backbone`, that do not start
            from random values.
    """
    images = jnp.zeros((1, 64, 64, 3), jnp.float32)  # parameters do not depend on the size
    with jax.numpy_dtype_promotion("standard"):  # Flax relies on it
        variables = {"batch_stats": {}, **model.init(jax.random.key(config.seed), images)}
    for kind, modules in (pretrained or {}).items():
        variables[kind] = {**variables[kind], **modules}
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        ghm=init_ghm_states(config),
        # A copy: a buffer that is in the state twice cannot be donated.
        ema_params=jax.tree.map(jnp.copy, params) if config.optimizer.ema else None,
        skipped=Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )

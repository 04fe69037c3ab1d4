"""One training step of one replica: a pure function of the state and a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghm_jax.batch import Batch, ModelInputs
from ghm_jax.config import Config
from ghm_jax.detection.loss import GHMStates, LossTerms, detection_loss
from ghm_jax.detection.matching import Targets
from ghm_jax.detection.outputs import Outputs, apply_network, make_targets
from ghm_jax.losses import LossStats
from ghm_jax.models import RetinaNet
from ghm_jax.training.state import Skipped, TrainState


class _Gradients(NamedTuple):
    """What a step computes from its batch, over all replicas."""

    params: Any
    """Gradient of the loss, like the parameters."""
    norm: jax.Array
    """f32[], global norm of that gradient."""
    terms: LossTerms
    ghm: GHMStates
    """The next histograms."""
    stats: tuple[LossStats, LossStats]
    """Of the classification and the box loss."""
    batch_stats: Any
    """The next statistics of batch normalization."""
    num_positive: jax.Array
    """f32[], positive anchors per image."""
    nonfinite_images: jax.Array
    """i32[B], ids of images with NaN or Inf in the network's outputs; -1 for the others."""

    @property
    def num_nonfinite(self) -> jax.Array:
        """f32[], examples whose gradient norm is NaN or Inf."""
        stats_class, stats_box = self.stats
        return stats_class.num_nonfinite + stats_box.num_nonfinite

    @property
    def finite(self) -> jax.Array:
        """bool[], whether loss, gradient and outputs hold neither NaN nor Inf."""
        return jnp.isfinite(self.terms.total) & jnp.isfinite(self.norm) & (self.num_nonfinite == 0)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: Config,
    model: RetinaNet,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One step of one replica; state and metrics come out the same on all of `axis_name`.

    A step with NaN or Inf in its loss, gradient or network outputs changes nothing but the counts
    of steps and of skipped updates.

    Args:
        state: the same on all replicas.
        batch: this replica's share.
        config, model, optimizer: static, not traced.
        axis_name: replica axis; None: a single device.

    Returns:
        The next state and metrics over the whole batch, f32[]: loss, loss_class, loss_box,
        cross_entropy and box_error (unweighted means per example), num_positive (anchors per
        image), num_nonfinite, grad_norm; i32[]: skipped, skipped_in_a_row; nonfinite_images i32[B]:
        the ids of images for which the network's outputs were not finite, -1 for the others; and
        for a GHM loss a dict ghm_c or ghm_r with `counts` and `weights` f32[bins].
    """
    gradients = _compute_gradients(state, batch, config, model, axis_name)
    with jax.named_scope("optimizer"):
        updated = _apply_update(state, gradients, optimizer, config.optimizer.ema)
        next_state = _skip_if_nonfinite(state, updated, gradients.finite)
    return next_state, _metrics(gradients, next_state.skipped)


def _compute_gradients(
    state: TrainState, batch: Batch, config: Config, model: RetinaNet, axis_name: str | None
) -> _Gradients:
    """Matching, the forward pass, the losses, and the backward pass."""
    targets, inputs = make_targets(batch, config), batch.model_inputs()

    def total_loss(outputs: Outputs) -> tuple[jax.Array, Any]:
        terms, ghm, stats = detection_loss(
            *outputs,
            targets,
            state.ghm,
            config=config,
            axis_name=axis_name,
        )
        return terms.total, (terms, ghm, stats)

    outputs, batch_stats, vjp = microbatched_vjp(model, state, inputs, config.optimizer.accumulate)
    of_outputs, (terms, ghm, stats) = jax.grad(total_loss, has_aux=True)(outputs)
    params = vjp(of_outputs)
    num_positive, nonfinite_images = _per_image(outputs, targets, batch)
    if axis_name is not None:
        # Sums, not means: the losses already divide by the count of the whole batch.
        with jax.named_scope("gradients"):
            params, terms = jax.lax.psum((params, terms), axis_name)
        num_positive = jax.lax.pmean(num_positive, axis_name)
        nonfinite_images = jax.lax.all_gather(nonfinite_images, axis_name, tiled=True)
    norm = optax.tree.norm(params)
    return _Gradients(params, norm, terms, ghm, stats, batch_stats, num_positive, nonfinite_images)


def _per_image(outputs: Outputs, targets: Targets, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Positive anchors per image f32[], and the ids i32[b] of images with NaN or Inf, else -1."""
    num_positive = jnp.mean((targets.classes >= 0).sum(axis=1, dtype=jnp.int32).astype(jnp.float32))
    finite = functools.reduce(
        jnp.logical_and, [jnp.isfinite(x).all(axis=(1, 2)) for x in jax.tree.leaves(outputs)]
    )
    return num_positive, jnp.where(finite, -1, batch.image_id)


def _apply_update(
    state: TrainState, gradients: _Gradients, optimizer: optax.GradientTransformation, ema: float
) -> TrainState:
    """The state after the update, before the step is counted."""
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, opt_state = optimizer.update(gradients.params, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        done = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema, (1 + done) / (10 + done))  # the initial values fade quickly
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    return state._replace(
        params=params,
        batch_stats=gradients.batch_stats,
        opt_state=opt_state,
        ghm=gradients.ghm,
        ema_params=ema_params,
    )


def _skip_if_nonfinite(state: TrainState, updated: TrainState, finite: jax.Array) -> TrainState:
    """`updated`, or `state` where the step was not finite; steps and skipped updates are counted.

    Decided here and not by the host, which would have to wait for each step.
    """
    skipped = Skipped(
        total=state.skipped.total + (~finite).astype(jnp.int32),
        in_a_row=jnp.where(finite, 0, state.skipped.in_a_row + 1),
    )
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return chosen._replace(step=state.step + 1, skipped=skipped)


def _metrics(gradients: _Gradients, skipped: Skipped) -> dict[str, Any]:
    """What `train_step` reports."""
    stats_class, stats_box = gradients.stats
    metrics: dict[str, Any] = {
        "loss": gradients.terms.total,
        "loss_class": gradients.terms.classification,
        "loss_box": gradients.terms.box,
        "cross_entropy": stats_class.plain_loss,
        "box_error": stats_box.plain_loss,
        "num_positive": gradients.num_positive,
        "num_nonfinite": gradients.num_nonfinite,
        "grad_norm": gradients.norm,
        "skipped": skipped.total,
        "skipped_in_a_row": skipped.in_a_row,
        "nonfinite_images": gradients.nonfinite_images,
    }
    for name, stats in (("ghm_c", stats_class), ("ghm_r", stats_box)):
        if stats.counts is not None:
            metrics[name] = {"counts": stats.counts, "weights": stats.weights}
    return metrics


def microbatched_vjp(
    model: RetinaNet, state: TrainState, inputs: ModelInputs, microbatches: int
) -> tuple[Outputs, Any, Callable[[Outputs], Any]]:
    """The network on a batch, for training, and its gradient.

    With several microbatches, one after the other, only the activations of one are held at a time.
    The loss then sees the outputs of the whole batch, so that its histograms, counts and sorting
    are exactly those of one batch; for the gradients the network runs a second time.

    Args:
        model, state: as for `train_step`.
        inputs: images of one replica.
        microbatches: must divide b.

    Returns:
        The outputs, the next batch statistics, and a function from the gradient with respect to
        the outputs to that with respect to the parameters.
    """

    def network(params: Any, batch_stats: Any, images: ModelInputs) -> tuple[Outputs, Any]:
        return apply_network(model, params, batch_stats, images, train=True)

    if microbatches == 1:
        outputs, vjp, batch_stats = jax.vjp(
            lambda params: network(params, state.batch_stats, inputs), state.params, has_aux=True
        )
        return outputs, batch_stats, lambda of_outputs: vjp(of_outputs)[0]

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])

    def forward(batch_stats: Any, images: ModelInputs) -> tuple[Any, Outputs]:
        outputs, batch_stats = network(state.params, batch_stats, images)
        return batch_stats, outputs

    def backward(total: Any, microbatch: tuple[ModelInputs, Outputs]) -> tuple[Any, None]:
        images, of_outputs = microbatch
        of_network = jax.vjp(
            lambda params: network(params, state.batch_stats, images), state.params, has_aux=True
        )[1]
        return jax.tree.map(jnp.add, total, of_network(of_outputs)[0]), None

    each = jax.tree.map(split, inputs)
    batch_stats, outputs = jax.lax.scan(forward, state.batch_stats, each)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    def vjp_of_all(of_outputs: Outputs) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        return jax.lax.scan(backward, zeros, (each, jax.tree.map(split, of_outputs)))[0]

    return outputs, batch_stats, vjp_of_all

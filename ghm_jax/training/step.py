"""What one replica does in a step of training or prediction: pure functions of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ghm_jax.batch import Batch, ModelInputs
from ghm_jax.config import Config
from ghm_jax.detection.anchors import level_sizes
from ghm_jax.detection.loss import detection_loss
from ghm_jax.detection.outputs import apply_network, make_targets
from ghm_jax.models import RetinaNet
from ghm_jax.training.state import Skipped, TrainState


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

    A step whose loss, gradient or network outputs are not finite changes nothing but the counts
    of steps and of skipped updates.

    Args:
        state: the same on all replicas.
        batch: this replica's part.
        config, model, optimizer: what to do, not traced.
        axis_name: replica axis; None: a single device.

    Returns:
        The next state and metrics over the whole batch, f32[]: loss, loss_class, loss_box,
        cross_entropy and box_error (unweighted means per example), num_positive (anchors an
        image), num_nonfinite, grad_norm; i32[]: skipped, skipped_in_a_row; nonfinite_images i32[B]:
        the ids of images for which the network's outputs were not finite, -1 for the others; and
        for a GHM loss a dict ghm_c or ghm_r with `counts` and `weights` f32[bins].
    """
    targets, inputs = make_targets(batch, config), batch.model_inputs()

    def total_loss(outputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        parts, ghm, stats = detection_loss(
            *outputs,
            targets,
            state.ghm,
            config=config,
            level_sizes=level_sizes(inputs.padded_size, model.anchors_per_cell),
            axis_name=axis_name,
        )
        return parts.total, (parts, ghm, stats)

    outputs, batch_stats, pull_back = _run(model, state, inputs, config.optimizer.accumulate)
    gradient, (parts, ghm, stats) = jax.grad(total_loss, has_aux=True)(outputs)
    grads = pull_back(gradient)
    num_positive = jnp.mean((targets.classes >= 0).sum(axis=1).astype(jnp.float32))
    logits, deltas = outputs
    finite_images = jnp.isfinite(logits).all(axis=(1, 2)) & jnp.isfinite(deltas).all(axis=(1, 2))
    nonfinite_images = jnp.where(finite_images, -1, batch.image_id)
    if axis_name is not None:
        # Sums, not means: the losses already divide by the count of the whole batch.
        grads, parts = jax.lax.psum((grads, parts), axis_name)
        num_positive = jax.lax.pmean(num_positive, axis_name)
        nonfinite_images = jax.lax.all_gather(nonfinite_images, axis_name, tiled=True)
    grad_norm = optax.tree.norm(grads)
    stats_class, stats_box = stats
    num_nonfinite = stats_class.num_nonfinite + stats_box.num_nonfinite

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        done = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.optimizer.ema, (1 + done) / (10 + done))  # the start fades fast
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    # Decided here and not by the host, which would have to wait for each step.
    finite = jnp.isfinite(parts.total) & jnp.isfinite(grad_norm) & (num_nonfinite == 0)
    skipped = Skipped(
        total=state.skipped.total + ~finite,
        in_a_row=jnp.where(finite, 0, state.skipped.in_a_row + 1),
    )
    changed = TrainState(state.step, params, batch_stats, opt_state, ghm, ema_params, state.skipped)
    next_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
    next_state = next_state._replace(step=state.step + 1, skipped=skipped)

    metrics = {
        "loss": parts.total,
        "loss_class": parts.classification,
        "loss_box": parts.box,
        "cross_entropy": stats_class.plain_loss,
        "box_error": stats_box.plain_loss,
        "num_positive": num_positive,
        "num_nonfinite": num_nonfinite,
        "grad_norm": grad_norm,
        "skipped": skipped.total,
        "skipped_in_a_row": skipped.in_a_row,
        "nonfinite_images": nonfinite_images,
    }
    for name, part in (("ghm_c", stats_class), ("ghm_r", stats_box)):
        if part.counts is not None:
            metrics[name] = {"counts": part.counts, "weights": part.weights}
    return next_state, metrics


def _run(
    model: RetinaNet, state: TrainState, inputs: ModelInputs, parts: int
) -> tuple[tuple[jax.Array, jax.Array], Any, Callable[[Any], Any]]:
    """The network on a batch, for training.

    In several parts, one after the other, so that the activations of one part only are held at a
    time. The loss then sees the outputs of the whole batch, whose histograms, counts and sorting
    are exactly those of one part; for the gradients the network runs a second time.

    Args:
        model, state: as for `train_step`.
        inputs: images of one replica.
        parts: must divide b.

    Returns:
        Logits f32[b, A, K] and deltas f32[b, A, 4], the next batch statistics, and a function from
        the gradient with respect to the outputs to that with respect to the parameters.
    """

    def network(params: Any, batch_stats: Any, part: ModelInputs) -> tuple[Any, Any]:
        return apply_network(model, params, batch_stats, part, train=True)

    if parts == 1:
        outputs, pull_back, batch_stats = jax.vjp(
            lambda params: network(params, state.batch_stats, inputs), state.params, has_aux=True
        )
        return outputs, batch_stats, lambda gradient: pull_back(gradient)[0]

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    def forward(batch_stats: Any, part: ModelInputs) -> tuple[Any, Any]:
        outputs, batch_stats = network(state.params, batch_stats, part)
        return batch_stats, outputs

    def backward(total: Any, of_part: tuple[ModelInputs, Any]) -> tuple[Any, None]:
        part, gradient = of_part
        _, pull_back, _ = jax.vjp(
            lambda params: network(params, state.batch_stats, part), state.params, has_aux=True
        )
        return jax.tree.map(jnp.add, total, pull_back(gradient)[0]), None

    each = jax.tree.map(split, inputs)
    batch_stats, outputs = jax.lax.scan(forward, state.batch_stats, each)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    def gradient(of_outputs: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        return jax.lax.scan(backward, zeros, (each, jax.tree.map(split, of_outputs)))[0]

    return outputs, batch_stats, gradient

"""What one replica does in a step of training or prediction: pure functions of arrays."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghm_jax.anchors import level_sizes, make_anchors
from ghm_jax.config import Config
from ghm_jax.detection_loss import GHMStates, detection_loss, init_ghm_states
from ghm_jax.matching import IGNORE, Targets, match_anchors
from ghm_jax.models import RetinaNet
from ghm_jax.nms import Detections, select_detections

Batch = dict[str, Any]
"""Arrays of `ghm_jax.data.batching`."""

# Channel means and standard deviations of ImageNet in 0..255, as torchvision and mmdetection.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


class TrainState(NamedTuple):
    """All that training changes; one pytree, and what a checkpoint holds."""

    step: jax.Array
    """i32[], steps done."""
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ghm: GHMStates


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


def init_state(
    config: Config,
    model: RetinaNet,
    optimizer: optax.GradientTransformation,
    pretrained: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step. To be jitted: the network runs.

    Args:
        config: fixes what is random by its `seed`.
        model, optimizer: what to do, not traced.
        pretrained: `params` and `batch_stats` of those parts of the network, such as `backbone`,
            that do not start at random.
    """
    images = jnp.zeros((1, 64, 64, 3), jnp.float32)  # parameters do not depend on the size
    variables = {"batch_stats": {}, **model.init(jax.random.key(config.seed), images)}
    for kind, parts in (pretrained or {}).items():
        variables[kind] = {**variables[kind], **parts}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        ghm=init_ghm_states(config),
    )


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

    Args:
        state: the same on all replicas.
        batch: images u8[b, H, W, 3], boxes f32[b, M, 4], labels i32[b, M], image_size i32[b, 2]:
            this replica's part.
        config, model, optimizer: what to do, not traced.
        axis_name: replica axis; None: a single device.

    Returns:
        The next state and metrics over the whole batch, f32[]: loss, loss_class, loss_box,
        cross_entropy and box_error (unweighted means per example), num_positive (anchors an
        image), num_nonfinite, grad_norm; and for a GHM loss a dict ghm_c or ghm_r with `counts`
        and `weights` f32[bins].
    """

    def total_loss(params: Any) -> tuple[jax.Array, Any]:
        (logits, deltas), batch_stats = _apply(model, params, state.batch_stats, batch, train=True)
        targets = make_targets(batch, config)
        parts, ghm, stats = detection_loss(
            logits,
            deltas,
            targets,
            state.ghm,
            config=config,
            level_sizes=level_sizes(_padded_size(batch), model.anchors_per_cell),
            axis_name=axis_name,
        )
        num_positive = jnp.mean((targets.classes >= 0).sum(axis=1).astype(jnp.float32))
        return parts.total, (parts, stats, num_positive, batch_stats, ghm)

    gradient_of = jax.value_and_grad(total_loss, has_aux=True)
    (_, (parts, stats, num_positive, batch_stats, ghm)), grads = gradient_of(state.params)
    if axis_name is not None:
        # Sums, not means: the losses already divide by the count of the whole batch.
        grads, parts = jax.lax.psum((grads, parts), axis_name)
        num_positive = jax.lax.pmean(num_positive, axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    stats_class, stats_box = stats
    metrics = {
        "loss": parts.total,
        "loss_class": parts.classification,
        "loss_box": parts.box,
        "cross_entropy": stats_class.plain_loss,
        "box_error": stats_box.plain_loss,
        "num_positive": num_positive,
        "num_nonfinite": stats_class.num_nonfinite + stats_box.num_nonfinite,
        "grad_norm": optax.tree.norm(grads),
    }
    for name, part in (("ghm_c", stats_class), ("ghm_r", stats_box)):
        if part.counts is not None:
            metrics[name] = {"counts": part.counts, "weights": part.weights}
    return TrainState(state.step + 1, params, batch_stats, opt_state, ghm), metrics


def predict_step(
    variables: dict[str, Any], batch: Batch, *, config: Config, model: RetinaNet
) -> Detections:
    """Detections [b, D] in pixels of the padded image.

    Args:
        variables: `params` and `batch_stats`.
        batch: images u8[b, H, W, 3] and image_size i32[b, 2] of one replica.
    """
    (logits, deltas), _ = _apply(
        model, variables["params"], variables["batch_stats"], batch, train=False
    )
    size = _padded_size(batch)
    per_cell = model.anchors_per_cell
    select = functools.partial(
        select_detections,
        anchors=_anchors(config, size),
        level_sizes=level_sizes(size, per_cell),
        score_threshold=config.predict.score_threshold,
        candidates=config.predict.candidates,
        nms_iou=config.predict.nms_iou,
        max_detections=config.predict.max_detections,
        soft_sigma=config.predict.nms_sigma,
        agnostic=config.predict.nms_classes == "all",
    )
    return jax.vmap(lambda scores, moves, image_size: select(scores, moves, image_size=image_size))(
        logits, deltas, batch["image_size"]
    )


def loss_inputs(
    variables: dict[str, Any], batch: Batch, *, config: Config, model: RetinaNet
) -> tuple[jax.Array, jax.Array, Targets]:
    """What the losses would see of a batch, as the network is in prediction.

    Args:
        variables: `params` and `batch_stats`.
        batch: as for `train_step`.

    Returns:
        Logits f32[b, A, K], deltas f32[b, A, 4], targets [b, A] and [b, A, 4].
    """
    (logits, deltas), _ = _apply(
        model, variables["params"], variables["batch_stats"], batch, train=False
    )
    return logits, deltas, make_targets(batch, config)


def make_targets(batch: Batch, config: Config) -> Targets:
    """Targets [b, A] of a batch. Anchors whose centre lies in the padding are ignored.

    An image counts as reaching to the next multiple of 32 pixels, as in the published code, where
    every image is padded so far by itself before it is padded to the batch.
    """
    anchors = _anchors(config, _padded_size(batch))
    match = functools.partial(
        match_anchors,
        anchors,
        positive_iou=config.anchors.positive_iou,
        negative_iou=config.anchors.negative_iou,
        convention=config.anchors.convention,
        crowd=config.anchors.crowd,
    )
    targets = jax.vmap(match)(batch["boxes"], batch["labels"])
    reach = -(-batch["image_size"] // 32) * 32  # [b, 2] height, width
    x, y = 0.5 * (anchors[:, 0] + anchors[:, 2]), 0.5 * (anchors[:, 1] + anchors[:, 3])
    inside = (y[None, :] < reach[:, :1]) & (x[None, :] < reach[:, 1:])  # [b, A]
    return targets._replace(classes=jnp.where(inside, targets.classes, IGNORE))


def normalize(images: jax.Array, image_size: jax.Array) -> jax.Array:
    """Images f32[b, H, W, 3] as the network takes them, of mean 0 and deviation 1 over ImageNet.

    What lies beyond image_size i32[b, 2] (height, width) is padding and becomes 0, the mean colour:
    weights trained elsewhere know it so, from pipelines that pad after this.

    Args:
        images: u8[b, H, W, 3], RGB.
        image_size: pixels of each image that are not padding.
    """
    height, width = images.shape[1:3]
    values = (images.astype(jnp.float32) - jnp.asarray(_MEAN)[None, None, None]) / (
        jnp.asarray(_STD)[None, None, None]
    )
    rows = jnp.arange(height)[None, :] < image_size[:, :1]  # [b, H]
    columns = jnp.arange(width)[None, :] < image_size[:, 1:]  # [b, W]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], values, 0.0)


def _apply(
    model: RetinaNet, params: Any, batch_stats: Any, batch: Batch, *, train: bool
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    images = normalize(batch["images"], batch["image_size"])
    outputs, changed = model.apply(
        {"params": params, "batch_stats": batch_stats}, images, train=train, mutable=["batch_stats"]
    )
    return outputs, changed.get("batch_stats", batch_stats)


def _anchors(config: Config, size: tuple[int, int]) -> jax.Array:
    a = config.anchors
    return jnp.asarray(make_anchors(size, a.scale, a.octaves, a.ratios, a.convention))


def _padded_size(batch: Batch) -> tuple[int, int]:
    return batch["images"].shape[1], batch["images"].shape[2]

"""What one replica does in a step of training or prediction: pure functions of arrays."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghm_jax.config import Config
from ghm_jax.detection.anchors import level_sizes, make_anchors
from ghm_jax.detection.loss import GHMStates, detection_loss, init_ghm_states
from ghm_jax.detection.matching import IGNORE, Targets, match_anchors
from ghm_jax.detection.nms import Detections, select_detections
from ghm_jax.models import RetinaNet

Batch = dict[str, Any]
"""Arrays of `ghm_jax.data.batching`."""

# Channel means and standard deviations of ImageNet in 0..255, as torchvision and mmdetection.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


class Skipped(NamedTuple):
    """Updates that were left out because the loss or the gradient was not finite."""

    total: jax.Array
    """i32[]. Since the first step."""
    in_a_row: jax.Array
    """i32[]. Up to this step; 0 when it was finite."""


class TrainState(NamedTuple):
    """All that training changes; one pytree, and what a checkpoint holds."""

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
        """What to predict with, and what is evaluated and exported."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


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
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        ghm=init_ghm_states(config),
        # A copy: a buffer that is in the state twice cannot be given away twice.
        ema_params=jax.tree.map(jnp.copy, params) if config.optimizer.ema else None,
        skipped=Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
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

    A step whose loss, gradient or network outputs are not finite changes nothing but the counts
    of steps and of skipped updates.

    Args:
        state: the same on all replicas.
        batch: images u8[b, H, W, 3], boxes f32[b, M, 4], labels i32[b, M], image_size i32[b, 2],
            image_id i32[b]: this replica's part.
        config, model, optimizer: what to do, not traced.
        axis_name: replica axis; None: a single device.

    Returns:
        The next state and metrics over the whole batch, f32[]: loss, loss_class, loss_box,
        cross_entropy and box_error (unweighted means per example), num_positive (anchors an
        image), num_nonfinite, grad_norm; i32[]: skipped, skipped_in_a_row; nonfinite_images i32[B]:
        the ids of images for which the network's outputs were not finite, -1 for the others; and
        for a GHM loss a dict ghm_c or ghm_r with `counts` and `weights` f32[bins].
    """
    targets = make_targets(batch, config)

    def total_loss(outputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        parts, ghm, stats = detection_loss(
            *outputs,
            targets,
            state.ghm,
            config=config,
            level_sizes=level_sizes(_padded_size(batch), model.anchors_per_cell),
            axis_name=axis_name,
        )
        return parts.total, (parts, ghm, stats)

    outputs, batch_stats, pull_back = _run(model, state, batch, config.optimizer.accumulate)
    gradient, (parts, ghm, stats) = jax.grad(total_loss, has_aux=True)(outputs)
    grads = pull_back(gradient)
    num_positive = jnp.mean((targets.classes >= 0).sum(axis=1).astype(jnp.float32))
    logits, deltas = outputs
    finite_images = jnp.isfinite(logits).all(axis=(1, 2)) & jnp.isfinite(deltas).all(axis=(1, 2))
    nonfinite_images = jnp.where(finite_images, -1, batch["image_id"])
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
    model: RetinaNet, state: TrainState, batch: Batch, parts: int
) -> tuple[tuple[jax.Array, jax.Array], Any, Callable[[Any], Any]]:
    """The network on a batch, for training.

    In several parts, one after the other, so that the activations of one part only are held at a
    time. The loss then sees the outputs of the whole batch, whose histograms, counts and sorting
    are exactly those of one part; for the gradients the network runs a second time.

    Args:
        model, state, batch: as for `train_step`.
        parts: must divide b.

    Returns:
        Logits f32[b, A, K] and deltas f32[b, A, 4], the next batch statistics, and a function from
        the gradient with respect to the outputs to that with respect to the parameters.
    """

    def network(params: Any, batch_stats: Any, part: Batch) -> tuple[Any, Any]:
        return _apply(model, params, batch_stats, part, train=True)

    if parts == 1:
        outputs, pull_back, batch_stats = jax.vjp(
            lambda params: network(params, state.batch_stats, batch), state.params, has_aux=True
        )
        return outputs, batch_stats, lambda gradient: pull_back(gradient)[0]

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    def forward(batch_stats: Any, part: Batch) -> tuple[Any, Any]:
        outputs, batch_stats = network(state.params, batch_stats, part)
        return batch_stats, outputs

    def backward(total: Any, of_part: tuple[Batch, Any]) -> tuple[Any, None]:
        part, gradient = of_part
        _, pull_back, _ = jax.vjp(
            lambda params: network(params, state.batch_stats, part), state.params, has_aux=True
        )
        return jax.tree.map(jnp.add, total, pull_back(gradient)[0]), None

    inputs = {name: split(batch[name]) for name in ("images", "image_size")}
    batch_stats, outputs = jax.lax.scan(forward, state.batch_stats, inputs)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    def gradient(of_outputs: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        return jax.lax.scan(backward, zeros, (inputs, jax.tree.map(split, of_outputs)))[0]

    return outputs, batch_stats, gradient


def predict_step(
    variables: dict[str, Any], batch: Batch, *, config: Config, model: RetinaNet
) -> Detections:
    """Detections [b, D] in pixels of the padded image.

    Args:
        variables: `params` and `batch_stats`.
        batch: images u8[b, H, W, 3] and image_size i32[b, 2] of one replica.
    """
    outputs = network_outputs(variables, batch, model=model)
    return choose_detections(outputs, batch, config=config)


def network_outputs(
    variables: dict[str, Any], batch: Batch, *, model: RetinaNet
) -> tuple[jax.Array, jax.Array]:
    """Logits f32[b, A, K] and deltas f32[b, A, 4], as the network is in prediction.

    Args:
        variables: `params` and `batch_stats`.
        batch: as for `predict_step`.
    """
    outputs, _ = _apply(model, variables["params"], variables["batch_stats"], batch, train=False)
    return outputs


def choose_detections(
    outputs: tuple[jax.Array, jax.Array], batch: Batch, *, config: Config
) -> Detections:
    """Detections [b, D] of the network's outputs; `batch` as for `predict_step`."""
    size = _padded_size(batch)
    per_cell = config.anchors.octaves * len(config.anchors.ratios)
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
        *outputs, batch["image_size"]
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
    return *network_outputs(variables, batch, model=model), make_targets(batch, config)


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

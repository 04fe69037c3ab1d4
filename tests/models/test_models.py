"""The network: sizes as published, outputs in the order of the anchors."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghm_jax.config import BACKBONES
from ghm_jax.detection.anchors import STRIDES, level_sizes, make_anchors
from ghm_jax.detection.levels import join_levels
from ghm_jax.models import RetinaNet
from ghm_jax.models.fpn import FPN, upsample_nearest
from ghm_jax.models.heads import Head, prior_bias
from ghm_jax.models.resnet import (
    ARCHITECTURES,
    Architecture,
    Block,
    Conv,
    Norm,
    Normalization,
    NormKind,
    ResNet,
    is_frozen,
    num_groups_for,
)
from ghm_jax.training.optimizer import frozen_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def shapes_of(module, *inputs, **kwargs):
    """Shapes and types of the variables and outputs, without computing anything."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    init = functools.partial(module.init_with_output, **kwargs)
    outputs, variables = jax.eval_shape(init, KEY, *inputs)
    return variables, outputs


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def convolutions(function, *args):
    """(kernel height, stride, dtype) of every convolution that a function does.

    Those of 1x1 are matrix products, whose stride is not seen.
    """
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                kernel = eqn.invars[1].aval
                found.append((kernel.shape[0], eqn.params["window_strides"][0], kernel.dtype))
            if eqn.primitive.name == "dot_general":
                found.append((1, 1, eqn.invars[1].aval.dtype))
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize(
    ("name", "published", "classifier"),
    [
        # Parameters of torchvision's image classifiers, and of their last layer, which we omit.
        ("resnet18", 11_689_512, 512 * 1000 + 1000),
        ("resnet34", 21_797_672, 512 * 1000 + 1000),
        ("resnet50", 25_557_032, 2048 * 1000 + 1000),
        ("resnet101", 44_549_160, 2048 * 1000 + 1000),
        ("resnet152", 60_192_808, 2048 * 1000 + 1000),
        ("resnext50_32x4d", 25_028_904, 2048 * 1000 + 1000),
        ("resnext101_32x4d", 44_177_704, 2048 * 1000 + 1000),  # timm's; torchvision has none
        ("resnext101_32x8d", 88_791_336, 2048 * 1000 + 1000),
        ("resnext101_64x4d", 83_455_272, 2048 * 1000 + 1000),
    ],
)
def test_backbones_have_as_many_parameters_as_published(name, published, classifier):
    variables, features = shapes_of(ResNet(name, 64, 7, "frozen"), (1, 64, 96, 3), train=False)
    assert count(variables["params"]) == published - classifier
    expansion = 1 if name in ("resnet18", "resnet34") else 4
    assert [f.shape for f in features] == [
        (1, 64 // stride, 96 // stride, stride * 16 * expansion) for stride in (8, 16, 32)
    ]


def test_the_config_knows_every_backbone():
    assert tuple(ARCHITECTURES) == BACKBONES


def test_retinanet_has_as_many_parameters_as_published():
    variables, _ = shapes_of(RetinaNet(num_classes=80, anchors_per_cell=9), (1, 64, 64, 3))

    def conv(size, inputs, outputs):
        return size**2 * inputs * outputs + outputs

    fpn = sum(conv(1, c, 256) + conv(3, 256, 256) for c in (512, 1024, 2048))
    fpn += conv(3, 2048, 256) + conv(3, 256, 256)  # P6, P7
    heads = 8 * conv(3, 256, 256) + conv(3, 256, 9 * 80) + conv(3, 256, 9 * 4)
    total = 25_557_032 - 2_049_000 + fpn + heads
    assert count(variables["params"]) == total

    # mmdetection's has 37.74 million that are trained: it fixes the stem and the first stage.
    is_fixed = frozen_parameters(variables["params"], 1)
    fixed = jax.tree.map(lambda p, frozen: p if frozen else (), variables["params"], is_fixed)
    assert round((total - count(fixed)) / 1e6, 2) == 37.74


@pytest.mark.parametrize(
    ("layout", "published"),
    [
        # The affine part of v1's normalization is no parameter there.
        ({"p6_from": "p5"}, 34_014_999 + 53_120),
        ({"p6_from": "c5", "head_norm": "group"}, 38_198_935),
    ],
    ids=["v1", "v2"],
)
def test_both_layouts_of_torchvision_have_as_many_parameters_as_published(layout, published):
    model = RetinaNet(num_classes=91, anchors_per_cell=9, **layout)
    assert count(shapes_of(model, (1, 64, 64, 3))[0]["params"]) == published


def test_grouped_convolutions_mix_channels_of_one_group_only():
    norm = Normalization("frozen", None, jnp.float32, 1e-5)
    block = Block(Architecture(True, (1,), groups=4, group_width=32), 8, 1, norm)
    x = jax.random.normal(KEY, (1, 5, 5, 32))
    variables = block.init(KEY, x, train=False)
    kernel = variables["params"]["conv2"]["Conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 4, 16)  # 8 * 32 / 64 = 4 channels in each of 4 groups

    conv = Conv(16, 3, groups=4)
    x = np.asarray(x[..., :16])
    y = conv.apply({"params": {"Conv_0": {"kernel": kernel}}}, x)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2)
    )
    for group in range(4):
        channels = slice(4 * group, 4 * group + 4)
        expected = np.einsum("bhwcij,ijco->bhwo", windows[:, :, :, channels], kernel[..., channels])
        np.testing.assert_allclose(y[..., channels], expected, atol=1e-5)


def test_halving_is_done_by_the_3x3_convolution_of_a_block():
    module = ResNet("resnet50", 8, 7, "frozen")
    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(functools.partial(module.init, train=False), KEY, images)
    found = convolutions(lambda v: module.apply(v, images, train=False), variables)
    strided = sorted((size, stride) for size, stride, _ in found if stride > 1)
    assert strided == [(3, 2)] * 3 + [(7, 2)]
    assert len(found) == 1 + 3 * (3 + 4 + 6 + 3) + 4


@pytest.mark.parametrize("size", [(64, 96), (128, 32), (224, 160)])
def test_there_is_one_output_for_every_anchor(size):
    model = RetinaNet(
        num_classes=5, anchors_per_cell=6, backbone_name="resnet10", width=8, channels=8
    )
    _, (logits, deltas) = shapes_of(model, (2, *size, 3))
    anchors, sizes = make_anchors(size, 4.0, 2, (0.5, 1.0, 2.0)), level_sizes(size, 6)
    assert [level.shape for level in logits] == [(2, of_level, 5) for of_level in sizes]
    assert [level.shape for level in deltas] == [(2, of_level, 4) for of_level in sizes]
    assert sum(sizes) == len(anchors)


def test_a_head_orders_its_outputs_by_row_column_anchor_and_class():
    head = Head(anchors=3, outputs=4, channels=2, depth=0, norm="none")
    x = jnp.zeros((1, 5, 7, 2))
    variables = head.init(KEY, x)
    bias = jnp.arange(12.0)
    output = {**variables["params"]["output"], "bias": bias}
    y = head.apply({"params": {"output": output}}, x)
    np.testing.assert_array_equal(y[0], np.tile(bias.reshape(3, 4), (35, 1)))

    # One cell of the input moves the outputs of the 3x3 cells around it.
    y = head.apply(variables, x.at[0, 1, 4].set(1.0))
    changed = np.asarray(y != 0).any(axis=(0, 2)).reshape(5, 7, 3)
    expected = np.zeros((5, 7), bool)
    expected[0:3, 3:6] = True
    np.testing.assert_array_equal(changed, np.repeat(expected[..., None], 3, axis=2))


def test_a_change_in_the_image_changes_the_outputs_of_anchors_there():
    size, per_cell = (256, 384), 2
    model = RetinaNet(2, per_cell, backbone_name="resnet10", width=8, channels=8, head_convs=1)
    anchors = make_anchors(size, 4.0, per_cell, (1.0,))
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    images = jax.random.normal(KEY, (1, *size, 3))
    variables = jax.jit(model.init)(KEY, images)
    apply = jax.jit(model.apply)
    before = apply(variables, images)
    for x, y in ((96, 64), (320, 192)):
        after = apply(variables, images.at[:, y - 8 : y + 8, x - 8 : x + 8].set(8.0))
        for levels in zip(before, after, strict=True):
            start = 0
            for stride, a, b in zip(STRIDES, *levels, strict=True):
                moved = np.abs(a - b)[0].sum(axis=-1)
                most = center[start : start + len(moved)][np.argmax(moved)]
                assert np.abs(most - (x, y)).max() <= 2 * stride + 8, (stride, most)
                start += len(moved)


def test_a_new_detector_gives_every_pair_the_prior_probability():
    model = RetinaNet(3, 2, backbone_name="resnet10", width=8, channels=16, head_convs=1)
    images = jax.random.normal(KEY, (2, 64, 64, 3))
    variables = jax.jit(model.init)(KEY, images)
    logits, deltas = map(join_levels, jax.jit(model.apply)(variables, images))
    assert 0.008 < jax.nn.sigmoid(logits).mean() < 0.0125
    assert jnp.abs(deltas).max() < 1
    assert 1 / (1 + math.exp(-prior_bias(0.01))) == pytest.approx(0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_convolutions_have_the_chosen_dtype_and_the_rest_is_float32(dtype):
    model = RetinaNet(
        3,
        1,
        backbone_name="resnet10",
        width=8,
        channels=8,
        head_norm="group",
        dtype=jnp.dtype(dtype),
    )
    variables, outputs = shapes_of(model, (1, 64, 64, 3))
    assert {leaf.dtype.name for leaf in jax.tree.leaves((variables, outputs))} == {"float32"}
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    found = convolutions(model.apply, variables, images)
    assert {kind.name for _, _, kind in found} == {dtype}


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("side", [15, 16])
def test_convolutions_are_padded_equally_on_both_sides(kernel, side):
    """As PyTorch does; XLA's "SAME" pads strided convolutions of even images on one side only."""
    conv = Conv(4, kernel, stride=2)
    x = jax.random.normal(KEY, (1, side, side + 2, 3))
    variables = conv.init(KEY, x)
    p = kernel // 2
    padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))
    weights = variables["params"]["Conv_0"]["kernel"]
    expected = np.einsum("bhwcij,ijco->bhwo", windows[:, ::2, ::2], weights)
    np.testing.assert_allclose(conv.apply(variables, x), expected, atol=1e-5)


def test_the_pyramid_adds_the_coarse_level_to_the_fine_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    for size in ((6, 8), (5, 8), (5, 7)):
        # PyTorch's rule: the cell of the coarse level at floor(i * coarse / fine).
        row, column = (np.arange(n) * c // n for n, c in zip(size, (3, 4), strict=True))
        np.testing.assert_array_equal(
            upsample_nearest(jnp.asarray(x), size), x[:, row][:, :, column]
        )
    features = [rng.normal(size=(1, 8 >> i, 8 >> i, 4)).astype(np.float32) for i in range(3)]
    fpn = FPN(4)
    variables = fpn.init(KEY, features)
    levels = fpn.apply(variables, features)
    assert [level.shape[1] for level in levels] == [8, 4, 2, 1, 1]
    # Coarse features reach the fine levels, and not the other way round.
    for i, expected in ((0, [True, False, False, False, False]), (2, [True] * 5)):
        other = [feature + (number == i) for number, feature in enumerate(features)]
        pairs = zip(fpn.apply(variables, other), levels, strict=True)
        assert [bool((a != b).any()) for a, b in pairs] == expected


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
@pytest.mark.parametrize("relu_before_p7", [False, True])
def test_p6_and_p7_follow_their_settings(p6_from, relu_before_p7):
    """C5 and P5 are one cell, so that a convolution is the middle of its kernel."""
    keys = jax.random.split(KEY, 3)
    features = [jax.random.normal(k, (1, 4 >> i, 4 >> i, 6)) for i, k in enumerate(keys)]
    fpn = FPN(8, p6_from=p6_from, relu_before_p7=relu_before_p7)
    variables = fpn.init(KEY, features)
    _, _, p5, p6, p7 = (np.asarray(level)[0, 0, 0] for level in fpn.apply(variables, features))
    six, seven = (np.asarray(variables["params"][name]["kernel"][1, 1]) for name in ("p6", "p7"))
    source = np.asarray(features[-1])[0, 0, 0] if p6_from == "c5" else p5
    np.testing.assert_allclose(p6, source @ six, rtol=1e-4, atol=1e-6)
    assert (p6 < 0).any()
    source = np.maximum(p6, 0) if relu_before_p7 else p6
    np.testing.assert_allclose(p7, source @ seven, rtol=1e-4, atol=1e-6)


def test_a_head_with_groupnorm_is_convolution_normalization_relu(rng):
    """The layout of torchvision's v2: 32 groups of 256 channels, no bias before them."""
    head = Head(anchors=1, outputs=2, channels=256, depth=1, norm="group")
    x = rng.normal(size=(1, 1, 1, 256)).astype(np.float32)
    params = head.init(KEY, x)["params"]
    assert {name: set(part) for name, part in params.items()} == {
        "conv1": {"kernel"},
        "norm1": {"scale", "bias"},
        "output": {"kernel", "bias"},
    }
    params["norm1"] = {name: rng.normal(size=256) for name in ("scale", "bias")}
    y = (x[0, 0, 0] @ np.float64(params["conv1"]["kernel"][1, 1])).reshape(32, 8)
    y = (y - y.mean(axis=1, keepdims=True)) / np.sqrt(y.var(axis=1, keepdims=True) + 1e-5)
    y = np.maximum(y.ravel() * params["norm1"]["scale"] + params["norm1"]["bias"], 0)
    expected = y @ np.float64(params["output"]["kernel"][1, 1]) + params["output"]["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, x)[0, 0], expected, rtol=1e-4)


SMALL = {"backbone_name": "resnet10", "width": 8, "channels": 8, "head_convs": 1}


def loss_and_gradient(model, variables, images):
    """A number that depends on every output, the changed statistics, and its gradient."""

    def loss(params):
        outputs, changed = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        logits, deltas = map(join_levels, outputs)
        return (logits**2).mean() + (deltas**2).mean() + (logits**3).mean(), changed

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_rematerialization_changes_memory_only():
    models = [RetinaNet(3, 1, **SMALL, norm="batch", remat=remat) for remat in (False, True)]
    images = jax.random.normal(KEY, (2, 64, 64, 3))
    variables = [jax.jit(model.init)(KEY, images) for model in models]
    jax.tree.map(np.testing.assert_array_equal, *variables)  # the same names as well
    plain, again = (loss_and_gradient(m, variables[0], images) for m in models)
    scale = jax.tree.map(lambda x: float(np.abs(x).max()) + 1e-6, plain)
    jax.tree.map(
        lambda x, y, s: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * s),
        *(plain, again, scale),
    )
    # What is kept between the passes: with it only what goes into a stage.
    kept = [len(jax.tree.leaves(residuals(m, variables[0], images))) for m in models]
    assert kept[1] < kept[0]


def residuals(model, variables, images):
    """What the backward pass of the backbone gets from the forward pass."""

    def features(params):
        apply = functools.partial(model.apply, mutable=["batch_stats"])
        return apply(
            {**variables, "params": params}, images, method=lambda m, x: m.backbone(x, train=True)
        )[0]

    return jax.eval_shape(lambda params: jax.vjp(features, params)[1], variables["params"])


@pytest.mark.parametrize("frozen_stages", [0, 1, 3, 4])
def test_no_gradient_and_no_statistics_reach_frozen_stages(frozen_stages):
    model = RetinaNet(3, 1, **SMALL, norm="batch", frozen_stages=frozen_stages)
    images = jax.random.normal(KEY, (2, 64, 64, 3))
    variables = jax.jit(model.init)(KEY, images)
    (_, changed), grads = loss_and_gradient(model, variables, images)
    order = ["stem", "stage1", "stage2", "stage3", "stage4"]
    frozen = order[: frozen_stages + 1] if frozen_stages else []
    for name, part in grads["backbone"].items():
        still = not any(bool(leaf.any()) for leaf in jax.tree.leaves(part))
        assert still == (name.split("_")[0] in frozen), name
        assert is_frozen(name, frozen_stages) == still
    before, after = (v["batch_stats"]["backbone"] for v in (variables, changed))
    for name in before:
        pairs = zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True)
        assert all(bool((a == b).all()) for a, b in pairs) == (name.split("_")[0] in frozen), name
    assert all(leaf.any() for part in ("fpn", "box_head") for leaf in jax.tree.leaves(grads[part]))


def test_bfloat16_is_close_to_float32():
    models = [
        RetinaNet(3, 2, **SMALL, norm="group", dtype=kind) for kind in ("float32", "bfloat16")
    ]
    images = jax.random.normal(KEY, (1, 64, 64, 3))
    variables = jax.jit(models[0].init)(KEY, images)
    found = [map(join_levels, jax.jit(m.apply)(variables, images)) for m in models]
    for exact, rounded in zip(*found, strict=True):
        assert exact.dtype == rounded.dtype == jnp.float32
        error = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
        assert 0 < error < 0.02


class Normalized(nn.Module):
    """A convolution and its normalization."""

    kind: NormKind

    @nn.compact
    def __call__(self, x, *, train):
        norm = Normalization(self.kind, None, jnp.float32, 1e-3)
        return norm(Conv(6, 3, stride=2, name="conv"), "norm", x, train=train)


@pytest.mark.parametrize(
    ("kind", "train", "changes"),
    [
        ("frozen", True, False),
        ("frozen", False, False),
        ("batch", False, False),
        ("batch", True, True),
    ],
)
def test_only_batch_statistics_follow_the_data_and_only_in_training(kind, train, changes):
    module, x = Normalized(kind), 3 + 2 * jax.random.normal(KEY, (4, 9, 8, 5))
    variables = module.init(KEY, x, train=False)
    y, changed = module.apply(variables, x, train=train, mutable=["batch_stats"])
    stats = changed.get("batch_stats", variables["batch_stats"])["norm"]["BatchNorm_0"]
    before = Conv(6, 3, stride=2).apply({"params": variables["params"]["conv"]}, x)
    if changes:
        np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-4)
        mean = before.mean(axis=(0, 1, 2))
        np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    else:
        np.testing.assert_allclose(y, before / math.sqrt(1 + 1e-3), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(stats["mean"], 0)


def test_a_folded_norm_has_the_values_and_gradients_of_flax_batch_norm(rng):
    module, x = Normalized("frozen"), rng.normal(size=(2, 9, 8, 5)).astype(np.float32)

    def around(center, leaf):
        return jnp.asarray(center + rng.uniform(-0.5, 0.5, leaf.shape), jnp.float32)

    variables = jax.tree.map(functools.partial(around, 1.0), module.init(KEY, x, train=False))
    slopes = rng.normal(size=(2, 5, 4, 6)).astype(np.float32)

    def total(function, params, x):
        return jnp.sum(function(params, x) * slopes)

    def ours(params, x):
        return module.apply({**variables, "params": params}, x, train=True)

    def separate(params, x):
        conv = nn.Conv(6, (3, 3), 2, padding=1, use_bias=False)
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3)
        of_norm = {"batch_stats": variables["batch_stats"]["norm"]["BatchNorm_0"]}
        y = conv.apply({"params": params["conv"]["Conv_0"]}, x)
        return norm.apply({"params": params["norm"]["BatchNorm_0"], **of_norm}, y)

    found, expected = (
        jax.value_and_grad(functools.partial(total, f), argnums=(0, 1))(variables["params"], x)
        for f in (ours, separate)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours_, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 4, 8, 16, 24, 32, 48, 64, 256, 2048])
def test_groups_divide_the_channels(channels):
    groups = num_groups_for(channels)
    assert channels % groups == 0
    assert groups == 32 or channels // groups >= 2 or channels == 1
    Norm("group").init(KEY, jnp.zeros((1, 2, 2, channels)))

"""Names and shapes are the published ones; every tensor goes to its place, or an error names it."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_tensors import (
    MMDET_BUFFERS,
    leaves_by_tensor,
    published_shapes,
    random_tensors,
    shapes,
    tiny_shapes,
)

from ghm_jax.data.schema import COCO_CATEGORIES
from ghm_jax.models.weight_conversion import (
    class_names_of,
    class_rows_of,
    export_detector,
    import_backbone,
    import_detector,
)
from ghm_jax.models.weight_names import (
    BACKBONE,
    DETECTORS,
    MMDETECTION,
    TORCHVISION,
    TORCHVISION_2020,
)
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.training.build import make_model

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

each_detector = pytest.mark.parametrize("naming", DETECTORS, ids=lambda naming: naming.title)
# Written by hand from the state dicts of the published files, all with ResNet-50.
NAMES = {
    BACKBONE: """
        conv1.weight 64,3,7,7
        bn1.weight 64
        bn1.bias 64
        bn1.running_mean 64
        bn1.running_var 64
        layer1.0.conv1.weight 64,64,1,1
        layer1.0.conv2.weight 64,64,3,3
        layer1.0.bn2.weight 64
        layer1.0.conv3.weight 256,64,1,1
        layer1.0.bn3.running_var 256
        layer1.0.downsample.0.weight 256,64,1,1
        layer1.0.downsample.1.running_mean 256
        layer2.0.conv2.weight 128,128,3,3
        layer2.3.conv1.weight 128,512,1,1
        layer3.5.conv3.weight 1024,256,1,1
        layer3.5.bn3.bias 1024
        layer4.0.downsample.0.weight 2048,1024,1,1
        layer4.2.bn3.weight 2048
    """,
    TORCHVISION_2020: """
        backbone.body.conv1.weight 64,3,7,7
        backbone.body.bn1.running_var 64
        backbone.body.layer1.0.downsample.0.weight 256,64,1,1
        backbone.body.layer1.0.downsample.1.bias 256
        backbone.body.layer4.2.conv3.weight 2048,512,1,1
        backbone.fpn.inner_blocks.0.weight 256,512,1,1
        backbone.fpn.inner_blocks.1.weight 256,1024,1,1
        backbone.fpn.inner_blocks.2.weight 256,2048,1,1
        backbone.fpn.inner_blocks.2.bias 256
        backbone.fpn.layer_blocks.0.weight 256,256,3,3
        backbone.fpn.layer_blocks.2.bias 256
        backbone.fpn.extra_blocks.p6.weight 256,2048,3,3
        backbone.fpn.extra_blocks.p7.weight 256,256,3,3
        backbone.fpn.extra_blocks.p7.bias 256
        head.classification_head.conv.0.weight 256,256,3,3
        head.classification_head.conv.2.bias 256
        head.classification_head.conv.4.weight 256,256,3,3
        head.classification_head.conv.6.bias 256
        head.classification_head.cls_logits.weight 720,256,3,3
        head.classification_head.cls_logits.bias 720
        head.regression_head.conv.6.weight 256,256,3,3
        head.regression_head.bbox_reg.weight 36,256,3,3
        head.regression_head.bbox_reg.bias 36
    """,
    TORCHVISION: """
        backbone.body.conv1.weight 64,3,7,7
        backbone.body.layer3.5.bn1.running_mean 256
        backbone.fpn.inner_blocks.0.0.weight 256,512,1,1
        backbone.fpn.inner_blocks.2.0.bias 256
        backbone.fpn.layer_blocks.0.0.weight 256,256,3,3
        backbone.fpn.layer_blocks.2.0.bias 256
        backbone.fpn.extra_blocks.p6.bias 256
        head.classification_head.conv.0.0.weight 256,256,3,3
        head.classification_head.conv.0.1.weight 256
        head.classification_head.conv.0.1.bias 256
        head.classification_head.conv.3.0.weight 256,256,3,3
        head.classification_head.conv.3.1.bias 256
        head.classification_head.cls_logits.bias 720
        head.regression_head.conv.0.0.weight 256,256,3,3
        head.regression_head.conv.3.1.weight 256
        head.regression_head.bbox_reg.weight 36,256,3,3
    """,
    MMDETECTION: """
        backbone.conv1.weight 64,3,7,7
        backbone.bn1.weight 64
        backbone.bn1.running_mean 64
        backbone.layer1.0.conv1.weight 64,64,1,1
        backbone.layer1.0.bn1.bias 64
        backbone.layer1.0.downsample.0.weight 256,64,1,1
        backbone.layer1.0.downsample.1.running_var 256
        backbone.layer2.3.conv2.weight 128,128,3,3
        backbone.layer3.0.downsample.0.weight 1024,512,1,1
        backbone.layer4.2.conv3.weight 2048,512,1,1
        neck.lateral_convs.0.conv.weight 256,512,1,1
        neck.lateral_convs.1.conv.weight 256,1024,1,1
        neck.lateral_convs.2.conv.weight 256,2048,1,1
        neck.lateral_convs.2.conv.bias 256
        neck.fpn_convs.0.conv.weight 256,256,3,3
        neck.fpn_convs.1.conv.bias 256
        neck.fpn_convs.2.conv.weight 256,256,3,3
        neck.fpn_convs.3.conv.weight 256,2048,3,3
        neck.fpn_convs.3.conv.bias 256
        neck.fpn_convs.4.conv.weight 256,256,3,3
        neck.fpn_convs.4.conv.bias 256
        bbox_head.cls_convs.0.conv.weight 256,256,3,3
        bbox_head.cls_convs.0.conv.bias 256
        bbox_head.cls_convs.3.conv.weight 256,256,3,3
        bbox_head.reg_convs.0.conv.weight 256,256,3,3
        bbox_head.reg_convs.3.conv.bias 256
        bbox_head.retina_cls.weight 720,256,3,3
        bbox_head.retina_cls.bias 720
        bbox_head.retina_reg.weight 36,256,3,3
        bbox_head.retina_reg.bias 36
    """,
}


@pytest.mark.parametrize("naming", NAMES, ids=lambda naming: naming.title)
def test_names_and_shapes_are_the_published_ones(naming):
    head_norm = "group" if naming is TORCHVISION else "none"
    variables = shapes(num_classes=80, anchors_per_cell=9, head_norm=head_norm)
    if naming is BACKBONE:
        variables = {kind: {"backbone": tree["backbone"]} for kind, tree in variables.items()}
    ours = published_shapes(naming, variables)
    for line in NAMES[naming].split("\n"):
        if line.strip():
            name, shape = line.split()
            assert ours[name] == tuple(map(int, shape.split(","))), name
    # 53 convolutions, each with a normalization of 4 tensors; 8 and 10 layers with a bias.
    heads = {BACKBONE: 0, TORCHVISION: 2 * 8 + 8 * 3 + 2 * 2}.get(naming, 2 * 8 + 2 * 10)
    assert len(ours) == 53 * 5 + heads


@pytest.mark.parametrize(
    ("experiment", "last_block", "inner", "per_group"),
    [  # of mmdetection's files: the last block of the third stage, channels of the first 3x3
        ("coco_r50_ghm", 5, 64, 64),
        ("coco_r101_ghm", 22, 64, 64),
        ("coco_x101_32x4d_ghm", 22, 128, 4),
        ("coco_x101_64x4d_ghm", 22, 256, 4),
    ],
)
def test_the_published_ghm_detectors_fit_their_experiments(
    experiment, last_block, inner, per_group
):
    config = load_experiment(EXPERIMENTS / f"{experiment}.py")
    model = make_model(config, 80)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    names = published_shapes(MMDETECTION, like)
    assert None not in names
    assert len(names) == len(jax.tree.leaves(like))
    assert names["backbone.layer1.0.conv1.weight"] == (inner, 64, 1, 1)
    assert names["backbone.layer1.0.conv2.weight"] == (inner, per_group, 3, 3)
    assert names["backbone.layer1.0.conv3.weight"] == (256, inner, 1, 1)
    assert f"backbone.layer3.{last_block}.conv3.weight" in names
    assert f"backbone.layer3.{last_block + 1}.conv3.weight" not in names
    assert names["neck.fpn_convs.3.conv.weight"] == (256, 2048, 3, 3)
    assert names["bbox_head.retina_cls.weight"] == (720, 256, 3, 3)


@each_detector
def test_every_tensor_goes_to_its_place(rng, naming):
    like = tiny_shapes()
    tensors = random_tensors(rng, naming, like)
    extra = {"backbone.body.bn1.num_batches_tracked": np.array(7)}
    if naming is MMDETECTION:
        extra |= {name: np.ones(shape, np.float32) for name, shape in MMDET_BUFFERS.items()}
    variables = import_detector({**tensors, **extra}, like)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    for name, (_, leaf) in leaves_by_tensor(naming, variables).items():
        if leaf.ndim == 4:
            out, inside, y, x = (int(rng.integers(n)) for n in tensors[name].shape)
            assert leaf[y, x, inside, out] == tensors[name][out, inside, y, x]
        else:
            np.testing.assert_array_equal(leaf, tensors[name], name)
        assert math.isclose(leaf.sum(), tensors[name].sum(), abs_tol=1e-4)


def test_a_backbone_is_imported_without_its_classifier(rng):
    like = tiny_shapes()
    backbone = {kind: {"backbone": tree["backbone"]} for kind, tree in like.items()}
    tensors = random_tensors(rng, BACKBONE, backbone)
    extra = {
        "fc.weight": np.ones((1000, 16)),
        "fc.bias": np.ones(1000),
        "bn1.num_batches_tracked": np.array(1),
        "layer1.0.bn1.num_batches_tracked": np.array(1),
    }
    variables = import_backbone({**tensors, **extra}, like)
    assert jax.tree.map(lambda x: x.shape, variables) == jax.tree.map(lambda x: x.shape, backbone)
    kernel = variables["params"]["backbone"]["stage2_block1"]["conv_shortcut"]["Conv_0"]["kernel"]
    np.testing.assert_array_equal(
        kernel[0, 0], tensors["layer2.0.downsample.0.weight"][:, :, 0, 0].T
    )
    stats = variables["batch_stats"]["backbone"]["stage4_block2"]["norm1"]["BatchNorm_0"]
    np.testing.assert_array_equal(stats["var"], tensors["layer4.1.bn1.running_var"])


@pytest.mark.parametrize("head_norm", ["none", "group"])
def test_exported_weights_are_imported_bit_for_bit(rng, head_norm):
    like = tiny_shapes(head_norm=head_norm)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)
    tensors = export_detector(variables)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    back = import_detector(tensors, like)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_heads_outputs_run_over_anchors_then_classes(rng):
    """torchvision's 91 classes are COCO's category ids; ids without a class are dropped."""
    names, anchors = tuple(COCO_CATEGORIES), 9
    file = tiny_shapes(num_classes=91, anchors_per_cell=anchors)
    like = tiny_shapes(num_classes=80, anchors_per_cell=anchors)
    tensors = random_tensors(rng, TORCHVISION, file)
    rows = class_rows_of(tensors, names, COCO_CATEGORIES)
    output = import_detector(tensors, like, rows)["params"]["class_head"]["output"]
    theirs = "head.classification_head.cls_logits."
    for label, name in enumerate(names):
        for anchor in (0, 5, 8):
            ours, row = anchor * 80 + label, anchor * 91 + COCO_CATEGORIES[name]
            assert output["bias"][ours] == tensors[theirs + "bias"][row]
            np.testing.assert_array_equal(
                output["kernel"][..., ours],
                tensors[theirs + "weight"][row].transpose(1, 2, 0),
            )


@pytest.mark.parametrize(
    ("naming", "num_classes", "names", "rows"),
    [
        (TORCHVISION, 91, ("person", "toothbrush", "stop sign"), [1, 90, 13]),
        (TORCHVISION_2020, 91, ("person",), [1]),
        (MMDETECTION, 80, ("person", "toothbrush", "stop sign"), [0, 79, 11]),
        (MMDETECTION, 80, tuple(COCO_CATEGORIES), list(range(80))),
        (MMDETECTION, 3, ("a", "b", "c"), [0, 1, 2]),
        (MMDETECTION, 80, tuple(f"class {i}" for i in range(80)), list(range(80))),
        (TORCHVISION, 3, ("a", "b", "c"), [0, 1, 2]),
        (TORCHVISION, 4, ("a", "b", "c"), [1, 2, 3]),
        (MMDETECTION, 4, ("a", "b", "c"), None),
        (MMDETECTION, 91, ("person",), None),
        (TORCHVISION, 91, ("a", "b", "c"), None),
    ],
)
def test_classes_are_found_by_name_or_number(naming, num_classes, names, rows):
    tensors = published_shapes(naming, tiny_shapes(num_classes=num_classes))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    if rows is not None:
        assert class_rows_of(tensors, names, COCO_CATEGORIES) == rows
    else:
        with pytest.raises(ValueError, match=f"{num_classes} classes, the data set has"):
            class_rows_of(tensors, names, COCO_CATEGORIES)


ABC = ("a", "b", "c")


@pytest.mark.parametrize(
    ("naming", "num_classes", "in_file", "wanted", "rows"),
    [
        (MMDETECTION, 3, ABC, ABC, [0, 1, 2]),
        (MMDETECTION, 3, ABC, ("c", "a", "b"), [2, 0, 1]),
        (MMDETECTION, 3, ABC, ("b",), [1]),
        (TORCHVISION, 3, ABC, ("c", "a", "b"), [2, 0, 1]),
        (TORCHVISION, 4, ABC, ("c", "a", "b"), [3, 1, 2]),  # background first
        (MMDETECTION, 80, tuple(reversed(COCO_CATEGORIES)), ("person", "toothbrush"), [79, 0]),
        (MMDETECTION, 3, ABC, ("a", "d", "e"), "has the classes a, b, c, and lacks .*: d, e$"),
        (MMDETECTION, 3, ABC, ("x", "y", "z"), "lacks those of the data set: x, y, z$"),
        (MMDETECTION, 3, ("a", "b", "a"), ("b", "a", "a"), "names a class twice: a"),
        (MMDETECTION, 4, ABC, ABC, r"names 3 classes \(a, b, c\), but has outputs for 4"),
        (TORCHVISION, 5, ABC, ABC, "names 3 classes .* has outputs for 5"),
        (MMDETECTION, 2, ABC, ("a", "b"), "names 3 classes .* has outputs for 2"),
    ],
)
def test_class_names_in_the_file_decide(naming, num_classes, in_file, wanted, rows):
    tensors = published_shapes(naming, tiny_shapes(num_classes=num_classes))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    if isinstance(rows, list):
        assert class_rows_of(tensors, wanted, COCO_CATEGORIES, in_file) == rows
    else:
        with pytest.raises(ValueError, match=rows):
            class_rows_of(tensors, wanted, COCO_CATEGORIES, in_file)


@pytest.mark.parametrize("classes", ['["a", "b"]', ["a", "b"], ("a", "b")])
def test_class_names_are_a_list_or_json(classes):
    assert class_names_of(classes) == ("a", "b")


@pytest.mark.parametrize("classes", ["a, b", '{"a": 1}', "[1, 2]", '["a"', [1, 2], 5, ""])
def test_classes_that_are_no_list_of_names_are_refused(classes):
    with pytest.raises(ValueError, match="not a list of names"):
        class_names_of(classes)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


LATERAL = "neck.lateral_convs.1.conv.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: without(t, LATERAL), [f"lacks {LATERAL}"]),
        (
            lambda t: without(t, *[n for n in t if "cls_convs" in n]),
            ["lacks bbox_head.cls_convs.0.conv", " and 5 more"],
        ),
        (lambda t: {**t, "neck.extra.weight": np.zeros(3)}, ["has neck.extra.weight", "no place"]),
        (lambda t: {**t, "bbox_head.loss_cls.gamma": np.zeros(3)}, ["bbox_head.loss_cls.gamma"]),
        (
            lambda t: {**without(t, LATERAL), "neck.lateral_convs.1.weight": t[LATERAL]},
            [f"lacks {LATERAL}", "has neck.lateral_convs.1.weight"],
        ),
        (
            lambda t: {**t, LATERAL: t[LATERAL][:, :5]},
            [f"{LATERAL} is (4, 5, 1, 1), in the model (4, 8, 1, 1)"],
        ),
        (lambda t: {**t, LATERAL: t[LATERAL][0]}, [f"{LATERAL} is (8, 1, 1), in the model"]),
        (lambda t: {**t, LATERAL: t[LATERAL] * np.nan}, [f"{LATERAL} holds values", "not finite"]),
        (
            lambda t: {**t, "bbox_head.retina_cls.weight": np.zeros((7, 4, 3, 3))},
            ["bbox_head.retina_cls.weight is (7, 4, 3, 3), in the model (6, 4, 3, 3)"],
        ),
        (lambda t: {}, ["unknown names"]),
        (lambda t: {"a.b": np.zeros(3), "c": np.zeros(1)}, ["unknown names (a.b, c)"]),
        (lambda t: {"conv1.weight": np.zeros(3)}, ["holds an ImageNet classifier", "mmdetection"]),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(rng, change, words):
    like = tiny_shapes()
    tensors = change(random_tensors(rng, MMDETECTION, like))
    with pytest.raises(ValueError, match=r"\w") as refused:
        import_detector(tensors, like, [0, 1, 2])
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_depth_and_another_norm_are_refused(rng):
    like = tiny_shapes()
    backbone = {kind: {"backbone": tree["backbone"]} for kind, tree in like.items()}
    tensors = random_tensors(rng, BACKBONE, backbone)
    for other, word in (
        ({"backbone_name": "resnet34"}, "lacks layer1.2.bn1.bias"),
        ({"backbone_name": "resnet10"}, "has layer1.1."),
        ({"width": 4}, "bn1.bias is (2,), in the model (4,)"),
        ({"norm": "group"}, "GroupNorm"),
    ):
        with pytest.raises(ValueError, match=r"\w") as refused:
            import_backbone(tensors, tiny_shapes(**other))
        assert word in str(refused.value)
    with pytest.raises(ValueError, match=r"has no backbone/.*GroupNorm_0"):
        export_detector(tiny_shapes(norm="group"))

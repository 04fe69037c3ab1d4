"""Weights of torchvision's models give the same numbers here, from the image to the detections.

    pip install -e ".[parity]"        # see the README for machines without a GPU
    pytest tests/test_parity_torchvision.py

The weights are random: nothing is downloaded. Detectors are those of the experiment files.
"""

import dataclasses
import functools
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torchvision_oracle import (
    randomize,
    tensors_of,
    to_numpy,
    to_torch,
    torch,
    torchvision,
)

from ghm_jax.batch import ModelInputs
from ghm_jax.detection.anchors import make_anchors
from ghm_jax.detection.boxes import box_iou, columns, decode_boxes, encode_boxes
from ghm_jax.detection.levels import join_levels
from ghm_jax.detection.matching import match_anchors
from ghm_jax.detection.outputs import predict_step
from ghm_jax.models.resnet import ResNet
from ghm_jax.models.weight_conversion import export_detector, import_backbone, import_detector
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.training.build import make_model
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.state import init_state

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SIZES = ((64, 96), (128, 160), (224, 320))
NUM_CLASSES = 91
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


def assert_close(ours, theirs, tolerance=1e-4):
    """The largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_backbones_give_the_same_features(rng, name):
    theirs = randomize(getattr(torchvision.models, name)(weights=None), seed=1)
    backbone = ResNet(name, 64, 7, "frozen")
    like = jax.eval_shape(
        functools.partial(backbone.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    variables = import_backbone(
        tensors_of(theirs), {kind: {"backbone": tree} for kind, tree in like.items()}
    )
    variables = {kind: tree["backbone"] for kind, tree in variables.items()}
    apply = jax.jit(functools.partial(backbone.apply, train=False))
    for size in SIZES:
        images = rng.normal(size=(2, *size, 3)).astype(np.float32)
        with torch.no_grad():
            x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(to_torch(images)))))
            expected = []
            for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
                x = stage(x)
                expected.append(to_numpy(x))
        for ours, feature in zip(apply(variables, images), expected[1:], strict=True):
            assert feature.std() > 0.05
            assert_close(ours, feature)


class Detectors:
    """torchvision's detector and ours with the same weights."""

    def __init__(self, experiment, build):
        config = load_experiment(EXPERIMENTS / f"{experiment}.py")
        model = dataclasses.replace(config.model, dtype="float32")
        self.config = dataclasses.replace(config, model=model)
        self.theirs = randomize(
            build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES), seed=2
        )
        # Outputs with a spread of 1: scores that are not all 0 or 1, boxes not all out of bounds.
        head = self.theirs.head
        with torch.no_grad():
            features = list(self.theirs.backbone(torch.randn(1, 3, 64, 96)).values())
            for layer, output in (
                (head.classification_head.cls_logits, head(features)["cls_logits"]),
                (head.regression_head.bbox_reg, head(features)["bbox_regression"]),
            ):
                layer.weight /= output.std()
        self.model = make_model(self.config, NUM_CLASSES)
        init = functools.partial(init_state, self.config, self.model, make_optimizer(self.config))
        state = jax.eval_shape(init)
        like = {"params": state.params, "batch_stats": state.batch_stats}
        self.variables = import_detector(tensors_of(self.theirs), like)
        self.apply = jax.jit(self.model.apply)


@pytest.fixture(
    scope="module",
    params=[
        ("coco_r50_torchvision", "retinanet_resnet50_fpn"),
        ("coco_r50_torchvision_v2", "retinanet_resnet50_fpn_v2"),
    ],
    ids=["v1", "v2"],
)
def detectors(request):
    experiment, build = request.param
    return Detectors(experiment, getattr(torchvision.models.detection, build))


@each_size
def test_detectors_give_the_same_logits_deltas_and_anchors(rng, detectors, size):
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        features = list(detectors.theirs.backbone(to_torch(images)).values())
        expected = detectors.theirs.head(features)
    logits, deltas = map(join_levels, detectors.apply(detectors.variables, images))
    assert expected["cls_logits"].std() > 0.1
    assert expected["bbox_regression"].std() > 0.1
    assert_close(logits, expected["cls_logits"])
    assert_close(deltas, expected["bbox_regression"])
    batch = torchvision.models.detection.image_list.ImageList(to_torch(images), [size] * 2)
    theirs = detectors.theirs.anchor_generator(batch, features)[0]
    np.testing.assert_array_equal(anchors_of(detectors.config, size), theirs)


@functools.cache
def published():
    """torchvision's RetinaNet v1, for its anchors, matching and box deltas."""
    return torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)


def anchors_of(config, size):
    a = config.anchors
    return make_anchors(size, a.scale, a.octaves, a.ratios, a.convention)


@pytest.mark.parametrize("size", [(608, 800), (800, 1344), (1344, 800)])
def test_anchors_of_full_size_images_are_the_same(size):
    config = load_experiment(EXPERIMENTS / "coco_r50_torchvision.py")
    features = [torch.zeros(1, 1, -(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32, 64, 128)]
    batch = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, *size), [size])
    np.testing.assert_array_equal(
        anchors_of(config, size), published().anchor_generator(batch, features)[0]
    )


@each_size
@pytest.mark.parametrize("num_boxes", [1, 5, 40])
def test_anchors_are_matched_to_the_same_boxes(rng, size, num_boxes):
    config = load_experiment(EXPERIMENTS / "coco_r50_torchvision.py")
    anchors, (height, width) = anchors_of(config, size), size
    sides = np.exp(rng.uniform(np.log(6), np.log(min(size) / 2), (num_boxes, 2)))
    corner = rng.uniform(0, 1, (num_boxes, 2)) * (np.array([width, height]) - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)

    overlap = torchvision.ops.boxes.box_iou(torch.tensor(boxes), torch.tensor(anchors))
    theirs = (
        published().proposal_matcher(overlap).numpy()
    )  # number of the box, -1 background, -2 between
    pairs = columns(boxes[:, None]), columns(anchors[None])
    np.testing.assert_allclose(box_iou(*pairs), overlap, atol=1e-5)

    padded = np.concatenate([boxes, np.zeros((3, 4), np.float32)])
    labels = np.concatenate([np.arange(num_boxes), [-1, -1, -1]]).astype(np.int32)
    a = config.anchors
    targets = match_anchors(
        jnp.asarray(anchors),
        jnp.asarray(padded),
        jnp.asarray(labels),
        positive_iou=a.positive_iou,
        negative_iou=a.negative_iou,
        convention=a.convention,
    )
    np.testing.assert_array_equal(targets.classes, theirs)
    positive = theirs >= 0
    assert positive.any()
    deltas = published().box_coder.encode_single(
        torch.tensor(boxes[theirs[positive]]), torch.tensor(anchors[positive])
    )
    np.testing.assert_allclose(targets.deltas[positive], deltas, atol=1e-5)


def test_boxes_are_encoded_and_decoded_alike(rng):
    anchors = anchors_of(load_experiment(EXPERIMENTS / "coco_r50_torchvision.py"), (128, 160))
    coder = published().box_coder
    for scale in (0.3, 3.0):  # of the second, many are beyond the limit of the sides
        deltas = rng.normal(scale=scale, size=anchors.shape).astype(np.float32)
        boxes = coder.decode_single(torch.tensor(deltas), torch.tensor(anchors))
        assert_close(decode_boxes(deltas, anchors), boxes, 1e-6)
    boxes = anchors + rng.uniform(-3, 3, anchors.shape).astype(np.float32)
    expected = coder.encode_single(torch.tensor(boxes), torch.tensor(anchors))
    np.testing.assert_allclose(encode_boxes(boxes, anchors), expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [[(128, 160)] * 2, [(100, 160), (128, 90)]], ids=str)
def test_an_image_gives_the_same_detections(rng, detectors, sizes):
    """End to end: normalization, padding, network, decoding, suppression, the highest scores."""
    theirs = detectors.theirs
    padded = np.zeros((2, 128, 160, 3), np.uint8)
    for image, (height, width) in zip(padded, sizes, strict=True):
        # Patches, so that levels differ within an image.
        patches = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        image[:height, :width] = patches.repeat(32, 0).repeat(32, 1)[:height, :width]
    images = [
        to_torch(image[None, :height, :width])[0].float() / 255
        for image, (height, width) in zip(padded, sizes, strict=True)
    ]
    # Images as they are: only the padding is torchvision's.
    theirs.transform.resize = lambda image, target: (image, target)
    with torch.no_grad():  # a threshold that a few hundred pairs pass
        x, _ = theirs.transform(images)
        logits = theirs.head(list(theirs.backbone(x.tensors).values()))["cls_logits"]
    best = torch.sigmoid(logits).flatten().topk(601).values
    threshold = float(best[-2:].mean())
    predict = dataclasses.replace(detectors.config.predict, score_threshold=threshold)
    theirs.score_thresh, theirs.detections_per_img = threshold, predict.max_detections
    theirs.nms_thresh, theirs.topk_candidates = predict.nms_iou, predict.candidates
    with torch.no_grad():
        expected = theirs(images)

    config = dataclasses.replace(detectors.config, predict=predict)
    step = functools.partial(predict_step, config=config, model=detectors.model)
    found = jax.jit(step)(detectors.variables, ModelInputs(padded, np.array(sizes, np.int32)))
    for i, detections in enumerate(expected):
        count = len(detections["scores"])
        assert count > 10
        assert 0.1 < detections["scores"].min() < detections["scores"].max() < 0.9999
        assert (np.asarray(found.labels[i]) >= 0).sum() == count
        ours = rows(found.boxes[i], found.scores[i], found.labels[i])[:count]
        keys = ("boxes", "scores", "labels")
        for row in rows(*(detections[key].numpy() for key in keys)):
            # Scores that differ by rounding may change places: each row has a match somewhere.
            distance = np.abs(ours - row) / np.array([1, 1, 160, 160, 160, 160])
            # Sides are exponentials of deltas that agree to 1e-4.
            assert distance.max(axis=1).min() < 5e-4, row


def rows(boxes, scores, labels):
    """[D, 6]: label, score, box."""
    columns = (np.asarray(labels)[:, None], np.asarray(scores)[:, None], np.asarray(boxes))
    return np.concatenate(columns, axis=1)


def test_the_published_v1_has_no_epsilon(rng):
    """torchvision sets it to 0 when it loads that file: channels that hardly vary show it."""
    config = load_experiment(EXPERIMENTS / "coco_r50_torchvision.py")
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    theirs = randomize(torchvision.models.resnet18(weights=None, norm_layer=frozen), seed=3)
    for module in theirs.modules():
        if isinstance(module, frozen):
            module.eps = 0.0
    theirs.bn1.running_var.data[:8] = 3e-6
    backbone = ResNet("resnet18", 64, 7, "frozen", norm_epsilon=config.model.norm_epsilon)
    init = functools.partial(backbone.init, train=False)
    like = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = import_backbone(
        tensors_of(theirs), {kind: {"backbone": tree} for kind, tree in like.items()}
    )
    images = rng.normal(size=(1, 64, 96, 3)).astype(np.float32)
    features = backbone.apply(
        {kind: tree["backbone"] for kind, tree in variables.items()}, images, train=False
    )
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    with torch.no_grad():
        x = to_torch(images)
        for name in names:
            x = getattr(theirs, name)(x)
    assert_close(features[-1], to_numpy(x))


def test_what_is_exported_loads_in_torchvision(detectors):
    theirs = detectors.theirs
    state = {name: torch.tensor(x) for name, x in export_detector(detectors.variables).items()}
    before = OrderedDict((name, x.clone()) for name, x in theirs.state_dict().items())
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    assert state.keys() == before.keys() - counters
    result = theirs.load_state_dict(state, strict=False)
    assert set(result.missing_keys) <= counters
    assert not result.unexpected_keys
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_file_of_2020_loads_here_as_in_torchvision(detectors):
    """The published v1 file has the names of 2020, which torchvision renames when it loads them."""
    if detectors.model.head_norm == "group":
        pytest.skip("v2 was published later")
    names = {}
    for name in tensors_of(detectors.theirs):
        old = name
        for i in range(4):
            old = old.replace(f"head.conv.{i}.0.", f"head.conv.{{{2 * i}}}.")
        for part in ("inner_blocks", "layer_blocks"):
            for i in range(3):
                old = old.replace(f"{part}.{i}.0.", f"{part}.{i}.")
        names[name] = old.replace("{", "").replace("}", "")
    new = tensors_of(detectors.theirs)
    old = {names[name]: tensor for name, tensor in new.items() if "num_batches" not in name}
    state = jax.tree.map(jnp.zeros_like, detectors.variables)
    again = import_detector(old, state)
    jax.tree.map(np.testing.assert_array_equal, again, detectors.variables)
    detectors.theirs.load_state_dict({name: torch.tensor(x) for name, x in old.items()})
    for name, tensor in tensors_of(detectors.theirs).items():
        np.testing.assert_array_equal(tensor, new[name])

"""Every experiment file holds a config that works: its step is traced, nothing is computed."""

import dataclasses
import functools
import json
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import draw_off_edges, published_weights, sigmoid

from ghm_jax.analysis.cost import training_operations
from ghm_jax.batch import Batch, GroundTruth
from ghm_jax.config import REFERENCE, Config, Loss, flatten
from ghm_jax.detection.loss import detection_loss, init_ghm_states, loss_weights
from ghm_jax.detection.matching import Targets
from ghm_jax.losses import smooth_l1_loss
from ghm_jax.runs.experiments import experiment_name, load_experiment
from ghm_jax.training.build import make_model
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.state import init_state
from ghm_jax.training.step import train_step

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if re.search(r"^configs? = ", path.read_text(), re.MULTILINE)
]
TABLES = {path: runpy.run_path(str(path)) for path in FILES}
# Every experiment as the command line takes it -> its config.
EXPERIMENTS = {
    f"{path.relative_to(ROOT)}{row}": load_experiment(f"{path}{row}")
    for path, table in TABLES.items()
    for row in [f":{name}" for name in table.get("configs", {})] + [""] * ("config" in table)
}


def first_of_each(kind: Callable[[Config], Any]) -> list[str]:
    """One experiment for each value of `kind`."""
    return list({kind(config): name for name, config in reversed(EXPERIMENTS.items())}.values())


def network(config: Config) -> Any:
    """What decides how the network is traced."""
    return dataclasses.replace(config.model, weights=""), config.anchors


def update(config: Config) -> Any:
    """What decides how losses and optimizer are traced: choices, not numbers."""
    return tuple(
        (key, value)
        for key, value in flatten(config).items()
        if key.startswith(("loss.", "optimizer.")) and type(value) not in (int, float, tuple)
    )


def trace(config: Config, num_classes: int = 80):
    """Shapes of the next state and of the metrics for a small batch."""
    model, optimizer = make_model(config, num_classes), make_optimizer(config)
    state = jax.eval_shape(functools.partial(init_state, config, model, optimizer))
    size, side = config.optimizer.batch_size, 128
    of_image = (size, config.data.max_boxes)
    truth = GroundTruth(
        boxes=jax.ShapeDtypeStruct((*of_image, 4), jnp.float32),
        labels=jax.ShapeDtypeStruct(of_image, jnp.int32),
        is_crowd=jax.ShapeDtypeStruct(of_image, jnp.bool_),
    )
    batch = Batch(
        images=jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8),
        image_size=jax.ShapeDtypeStruct((size, 2), jnp.int32),
        image_id=jax.ShapeDtypeStruct((size,), jnp.int32),
        truth=truth,
    )
    step = functools.partial(train_step, config=config, model=model, optimizer=optimizer)
    return state, jax.eval_shape(step, state, batch)


def test_every_experiment_passes_its_checks_and_has_a_unique_run_name():
    assert len({experiment_name(name) for name in EXPERIMENTS}) == len(EXPERIMENTS) > 30
    for config in EXPERIMENTS.values():
        config.check()


@pytest.mark.parametrize("name", first_of_each(network))
def test_the_step_of_every_network_can_be_traced(name):
    state, (next_state, _) = trace(EXPERIMENTS[name])
    assert jax.tree.map(lambda x: x.shape, next_state) == jax.tree.map(lambda x: x.shape, state)


@pytest.mark.parametrize("name", first_of_each(update))
def test_the_step_of_every_kind_of_loss_and_optimizer_can_be_traced(name):
    """With a small network: the losses see only its outputs, and every network is traced above."""
    small = EXPERIMENTS["experiments/quickstart.py"].model
    config = dataclasses.replace(EXPERIMENTS[name], model=small)
    state, (next_state, metrics) = trace(config)
    assert jax.tree.map(lambda x: x.shape, next_state) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("table", "rows"),
    # Tables of the paper, and how many of their rows are RetinaNets.
    [(1, 5), (2, 3), (3, 4), (4, 4), (5, 3), (6, 3)],
)
def test_every_row_of_a_table_of_the_paper_has_a_config_and_its_published_figures(table, rows):
    content = TABLES[ROOT / f"experiments/paper/table{table}.py"]
    assert list(content["configs"]) == list(content["published"])
    assert len(content["configs"]) == rows
    assert all(0 < figures["AP"] < 100 for figures in content["published"].values())


def test_rows_that_appear_in_several_tables_are_the_same_run():
    rows = {name.partition("paper/")[2]: config for name, config in EXPERIMENTS.items()}
    assert rows["table2.py:region_units"] == rows["table4.py:ghm_c"] == rows["table5.py:smooth_l1"]
    assert rows["table2.py:cross_entropy"] == rows["table4.py:cross_entropy"]
    assert rows["recipe.py"] == rows["table5.py:ghm_r"] == rows["table6.py:ghm_r"]
    published = [
        (content["published"][name]["AP"], content["published"][name].get("AP50"))
        for table, name in ((4, "ghm_c"), (5, "smooth_l1"), (6, "smooth_l1"))
        for content in [TABLES[ROOT / f"experiments/paper/table{table}.py"]]
    ]
    assert published == [(35.8, 55.5)] * 3


def test_the_paper_and_its_code_differ_as_documented():
    paper = EXPERIMENTS["experiments/paper/recipe.py"]
    code = EXPERIMENTS["experiments/paper/published_code.py:ghm"]
    assert (paper.loss.ghm_c.normalizer, paper.loss.ghm_scope) == ("bins", "batch")
    assert replace(code.loss.ghm_c, **REFERENCE) == code.loss.ghm_c
    assert replace(code.loss.ghm_r, **REFERENCE) == code.loss.ghm_r
    assert (code.loss.ghm_r.bins, code.loss.ghm_r.momentum) == (10, 0.7)
    assert (code.loss.ghm_scope, loss_weights(code.loss)) == ("level", (1.0, 10.0))
    assert code == load_experiment(ROOT / "experiments/coco_r50_ghm.py")
    epochs = [c.optimizer.steps / 7330 for c in (paper, code)]
    assert epochs == [14, 12]
    assert paper.model == code.model


def test_longer_schedules_and_larger_batches_see_the_same_images():
    rows = {name: EXPERIMENTS[f"experiments/coco_r50_schedules.py:{name}"] for name in SCHEDULES}
    assert rows["1x"] == load_experiment(ROOT / "experiments/coco_r50_ghm.py")
    once = rows["1x"].optimizer
    for name, times in SCHEDULES.items():
        optimizer = rows[name].optimizer
        images = optimizer.steps * optimizer.batch_size
        assert images == pytest.approx(times * once.steps * once.batch_size, rel=1e-3)
        assert optimizer.learning_rate / optimizer.batch_size == pytest.approx(0.01 / 16)


SCHEDULES = {"1x": 1, "2x": 2, "3x": 3, "float32": 1, "large_batch": 1}


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("coco_r50_ghm", "resnet50"),
        ("coco_r101_ghm", "resnet101"),
        ("coco_x101_32x4d_ghm", "resnext101_32x4d"),
        ("coco_x101_64x4d_ghm", "resnext101_64x4d"),
    ],
)
def test_the_published_detectors_differ_in_their_backbone_only(name, backbone):
    config = load_experiment(ROOT / f"experiments/{name}.py")
    assert (config.model.backbone, config.model.norm) == (backbone, "frozen")
    assert (config.model.frozen_stages, config.anchors.convention) == (1, "mmdetection")
    assert (config.optimizer, config.anchors) == (Config().optimizer, Config().anchors)
    assert config.loss == load_experiment(ROOT / "experiments/coco_r50_ghm.py").loss


@pytest.mark.parametrize("name", ["coco_r50_ghm", "coco_x101_64x4d_ghm"])
def test_the_gradient_of_the_published_recipes_has_the_size_of_a_call_per_level(name, rng):
    """Its norm, against float64, of outputs of five levels in three batches."""
    config = load_experiment(ROOT / f"experiments/{name}.py")
    states, cells, classes = init_ghm_states(config), (60, 20, 6, 3, 1), 4
    seen, seen_box = [], []  # (gradient norms, mask) of every call

    def losses(logits, deltas, targets, states):
        terms, states, _ = detection_loss(logits, deltas, targets, states, config=config)
        return terms.total, states

    for _ in range(3):
        wanted = rng.integers(-2, classes, (2, sum(cells)))
        box_targets = np.float32(rng.normal(0, 1, (2, sum(cells), 4)))
        expected, expected_box = [], []
        logits, deltas = [], []
        edges = np.cumsum(cells)[:-1]
        for of_level, boxes in zip(
            np.split(wanted, edges, 1), np.split(box_targets, edges, 1), strict=True
        ):
            targets = (of_level[..., None] == np.arange(classes)).astype(float)
            norm_of = functools.partial(lambda x, t: np.abs(sigmoid(x) - t), t=targets)
            draw = functools.partial(rng.normal, -1, 3, targets.shape)
            logits.append(draw_off_edges(draw, norm_of, 30))
            mask = np.broadcast_to(of_level[..., None] > -2, targets.shape)
            seen.append((norm_of(logits[-1]), mask))
            weights, _ = published_weights(*zip(*seen, strict=True), bins=30, momentum=0.75)
            expected.append(weights * seen[-1][0] / max(mask.sum(), 1))

            def box_norm(x, boxes=boxes):
                return np.abs(x - boxes) / np.hypot(x - boxes, 0.02)

            draw = functools.partial(rng.normal, 0, 0.5, boxes.shape)
            deltas.append(draw_off_edges(draw, box_norm, 10))
            mask = np.broadcast_to(of_level[..., None] >= 0, boxes.shape)
            seen_box.append((box_norm(np.float64(deltas[-1])), mask))
            weights, _ = published_weights(*zip(*seen_box, strict=True), bins=10, momentum=0.7)
            expected_box.append(10 * weights * seen_box[-1][0] / max(mask.sum(), 1))
        found, states = jax.jit(jax.grad(losses, argnums=(0, 1), has_aux=True))(
            [*map(jnp.asarray, logits)], [*map(jnp.asarray, deltas)],
            Targets(jnp.asarray(wanted, jnp.int32), jnp.asarray(box_targets)), states,
        )  # fmt: skip
        for got, want in zip(found, (expected, expected_box), strict=True):
            norm = np.sqrt(sum(np.square(np.float64(x)).sum() for x in got))
            assert norm == pytest.approx(np.sqrt(sum(np.square(x).sum() for x in want)), rel=1e-4)


def test_loss_weights_that_are_not_given_have_the_published_scale():
    published = {"classification": "focal", "box": "smooth_l1"}
    assert loss_weights(Loss(**published)) == loss_weights(Loss(**published, ghm_scope="level"))
    assert loss_weights(Loss(**published)) == (1.0, 4.0)
    assert loss_weights(Loss(ghm_scope="level")) == (1.0, 10.0)
    assert loss_weights(Loss(weight=0.5, box_weight=2.0)) == (0.5, 2.0)
    one_histogram = loss_weights(Loss())
    record = json.loads((ROOT / "experiments/results/gradient_scale.json").read_text())
    for index, (term, calls) in enumerate((("classification", 1.0), ("box", 10.0))):
        measured = [row[term]["ratio"] for row in record["rows"].values()]
        assert calls * min(measured) <= one_histogram[index] <= calls * max(measured)


@functools.cache
def operations(model: Any, anchors: Any) -> int:
    config = Config(model=model, anchors=anchors)
    return training_operations(config, 80, (800, 1344))


def a100_hours(config: Config) -> float:
    """Hours of a run on one A100 at an MFU of 30 %, if all images were 800 x 1344. By its data
    sheet it does 312 x 10^12 operations per second in bfloat16, half as many in float32."""
    peak = 312e12 if config.model.dtype == "bfloat16" else 156e12
    images = config.optimizer.steps * config.optimizer.batch_size
    return operations(config.model, config.anchors) * images / (0.3 * peak) / 3600


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_stated_training_time_of_a_coco_recipe_follows_from_its_operations(path):
    name = str(path.relative_to(ROOT))
    rows = [config for key, config in EXPERIMENTS.items() if key.partition(".py")[0] == name[:-3]]
    if rows[0].data.name != "coco/2017" or "for imported weights" in TABLES[path]["__doc__"]:
        pytest.skip("depends on the user's data, or is not for training")
    hours = {round(a100_hours(config)) for config in rows}
    text = " ".join(TABLES[path]["__doc__"].split())
    (stated,) = re.findall(r"Estimated, not run: (.*?) on one A100 at an MFU of 30 %", text)
    numbers = {int(number) for number in re.findall(r"\b(\d+)\b(?!x)", stated)}
    assert numbers == {min(hours), max(hours)}


@pytest.mark.parametrize("name", ["coco_r50_torchvision", "coco_r50_torchvision_v2"])
def test_the_box_loss_of_the_torchvision_recipes_has_the_scale_of_torchvision(name, rng):
    """It is the sum of |error| over the coordinates of an image's positives, by their number; a
    smooth L1 loss is less than that by half its threshold wherever the error is beyond it."""
    loss = load_experiment(ROOT / f"experiments/{name}.py").loss
    errors = rng.uniform(0.2, 2.0, (1, 6, 4)) * rng.choice([-1, 1], (1, 6, 4))
    positive = np.array([True, False, True, True, False, True])
    theirs = np.abs(errors[0, positive]).sum() / positive.sum()
    ours, _, _ = smooth_l1_loss(
        jnp.asarray(errors, jnp.float32), jnp.zeros((1, 6, 4)), jnp.asarray(positive[None, :, None])
    )
    assert loss.box == "smooth_l1"
    assert loss_weights(loss)[1] * (ours + 1 / 18) == pytest.approx(theirs, rel=1e-5)


def test_the_quickstart_trains_with_ghm_and_names_its_floor():
    loss = load_experiment(ROOT / "experiments/quickstart.py").loss
    assert (loss.classification, loss.box) == ("ghm_c", "ghm_r")
    assert loss.ghm_c.min_count > 0


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/results").glob("*.json")))
def test_a_result_says_how_it_was_measured(path):
    result = json.loads(path.read_text())
    assert {"command", "date", "device", "versions"} <= set(result)

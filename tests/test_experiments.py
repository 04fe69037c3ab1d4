"""Every experiment file holds a config that works: its step is traced, nothing is computed."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ghm_jax.config import Config
from ghm_jax.rundir import load_experiment
from ghm_jax.schedule import make_optimizer
from ghm_jax.step import init_state, make_model, train_step

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path for path in (ROOT / "experiments").glob("*.py") if "\nconfig = " in path.read_text()
)


def trace(config: Config, num_classes: int = 80):
    """Shapes of the next state and of the metrics for a batch of the first bucket."""
    model, optimizer = make_model(config, num_classes), make_optimizer(config)
    state = jax.eval_shape(functools.partial(init_state, config, model, optimizer))
    size, (height, width) = config.optimizer.batch_size, config.data.buckets[0]
    batch = {
        "images": jax.ShapeDtypeStruct((size, height, width, 3), jnp.uint8),
        "boxes": jax.ShapeDtypeStruct((size, config.data.max_boxes, 4), jnp.float32),
        "labels": jax.ShapeDtypeStruct((size, config.data.max_boxes), jnp.int32),
        "image_size": jax.ShapeDtypeStruct((size, 2), jnp.int32),
    }
    step = functools.partial(train_step, config=config, model=model, optimizer=optimizer)
    return state, jax.eval_shape(step, state, batch)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_experiment_passes_its_checks_and_its_step_can_be_traced(path):
    config = load_experiment(path).check()
    state, (next_state, metrics) = trace(config)
    assert jax.tree.map(lambda x: x.shape, next_state) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


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


def test_the_quickstart_trains_with_ghm_and_names_its_floor():
    loss = load_experiment(ROOT / "experiments/quickstart.py").loss
    assert (loss.classification, loss.box, loss.preset) == ("ghm_c", "ghm_r", "default")
    assert loss.min_count > 0


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/results").glob("*.json")))
def test_a_result_says_how_it_was_measured(path):
    result = json.loads(path.read_text())
    assert {"command", "date", "device", "versions"} <= set(result)

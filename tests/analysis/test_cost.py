"""What detectors cost, against published figures and convolutions counted by hand."""

import dataclasses
from pathlib import Path

import pytest
from tiny import tiny_config

from ghm_jax.analysis.cost import MODULES, describe, ideal_seconds, training_operations
from ghm_jax.cli.tables import description_table
from ghm_jax.config import Anchors, Model
from ghm_jax.runs.experiments import load_experiment

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def description(experiment, num_classes=80, padded_size=(800, 1280)):
    return describe(load_experiment(EXPERIMENTS / f"{experiment}.py"), num_classes, padded_size)


def test_r50_has_the_published_cost():
    found = description("coco_r50_ghm")
    # mmdetection's zoo: 37.74 million trained parameters, 239.32 G at 1280 x 800.
    assert round(found.total.trained / 1e6, 2) == 37.74
    assert found.total.parameters == 37_968_692
    assert found.total.multiply_adds == pytest.approx(239.32e9, rel=0.01)
    # XLA omits what falls on padding and counts other operations than convolutions.
    assert found.xla_flops / 2 == pytest.approx(found.total.multiply_adds, rel=0.015)
    assert found.anchors == 9 * (100 * 160 + 50 * 80 + 25 * 40 + 13 * 20 + 7 * 10)
    assert found.examples == 80 * found.anchors
    assert found.parameter_bytes == 4 * found.total.parameters


@pytest.mark.parametrize(
    ("experiment", "published"),
    [("coco_r50_torchvision", 151.54e9), ("coco_r50_torchvision_v2", 152.238e9)],
)
def test_torchvision_models_have_the_published_cost(experiment, published):
    """For 800 x 800 pixels and 91 classes. P6 from C5 and from P5 differ by 0.5 %."""
    found = description(experiment, num_classes=91, padded_size=(800, 800))
    assert found.total.multiply_adds == pytest.approx(published, rel=1e-4)


def conv(side: int, kernel: int, inputs: int, outputs: int) -> tuple[int, int]:
    """Weights and multiply-adds of a convolution to a square of cells."""
    weights = kernel**2 * inputs * outputs
    return weights, side**2 * weights


def test_a_small_network_costs_what_is_counted_by_hand():
    config = tiny_config(
        model=Model(
            backbone="resnet10", width=4, stem_kernel=3, norm="group", channels=8, head_convs=1
        ),
        anchors=Anchors(octaves=2, ratios=(1.0,)),
    )
    found = describe(config, num_classes=3, padded_size=(64, 64))
    stages = [conv(32, 3, 3, 4), conv(16, 3, 4, 4), conv(16, 3, 4, 4)]
    for side, inputs, outputs in ((8, 4, 8), (4, 8, 16), (2, 16, 32)):
        stages += [conv(side, 3, inputs, outputs), conv(side, 3, outputs, outputs)]
        stages += [conv(side, 1, inputs, outputs)]
    norms = 2 * (3 * 4 + 3 * 8 + 3 * 16 + 3 * 32)
    fpn = [conv(s, 1, c, 8) for s, c in ((8, 8), (4, 16), (2, 32))]
    fpn += [conv(s, 3, 8, 8) for s in (8, 4, 2)] + [conv(1, 3, 32, 8), conv(1, 3, 8, 8)]
    cells = 8**2 + 4**2 + 2**2 + 1 + 1
    expected = {
        "backbone": (sum(w for w, _ in stages) + norms, sum(m for _, m in stages)),
        "fpn": (sum(w for w, _ in fpn) + 8 * 8, sum(m for _, m in fpn)),
    }
    for name, outputs in (("class_head", 2 * 3), ("box_head", 2 * 4)):
        weights = 9 * 8 * 8 + 9 * 8 * outputs
        expected[name] = (weights + 8 + outputs, cells * weights)
    assert tuple(found.modules) == MODULES
    for name, (parameters, multiply_adds) in expected.items():
        module = found.modules[name]
        assert (module.parameters, module.trained) == (parameters, parameters), name
        assert module.multiply_adds == multiply_adds, name
    assert found.total.parameters == sum(parameters for parameters, _ in expected.values())
    assert found.anchors == 2 * cells


@pytest.mark.parametrize(
    ("frozen_stages", "without_gradient"),
    # Convolutions up to the first one that needs a gradient: none, or the stem and stage 1.
    [(0, []), (1, [conv(32, 7, 3, 4), conv(16, 3, 4, 4), conv(16, 3, 4, 4)])],
)
def test_training_costs_the_forward_pass_and_the_products_of_all_gradients(
    frozen_stages, without_gradient
):
    config = tiny_config()
    model = dataclasses.replace(config.model, frozen_stages=frozen_stages, remat=True)
    config = dataclasses.replace(config, model=model)
    forward = describe(config, 3, (64, 64)).total.multiply_adds
    # The images need no gradient; nor do features that come from frozen stages.
    inputs = [conv(32, 7, 3, 4)] if not frozen_stages else [conv(8, 3, 4, 8), conv(8, 1, 4, 8)]
    products = 3 * forward - sum(n for _, n in inputs) - 2 * sum(n for _, n in without_gradient)
    assert training_operations(config, 3, (64, 64)) == 2 * products


def test_ideal_seconds_need_a_known_peak():
    config = tiny_config()
    sizes = [(64, 64), (64, 96)]
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    for settings, kind in ((config, "NVIDIA H100"), (half, "cpu"), (config, "cpu")):
        assert ideal_seconds(settings, 3, sizes, [kind] * 2) == {}
    given = dataclasses.replace(config, run=dataclasses.replace(config.run, peak_teraflops=1.5))
    for settings, kind, peak in ((half, "NVIDIA H100", 989e12), (given, "cpu", 1.5e12)):
        found = ideal_seconds(settings, 3, sizes, [kind] * 2)
        for size in sizes:
            seconds = training_operations(config, 3, size) / (2 * peak)
            assert found[size] == pytest.approx(seconds)


@pytest.mark.parametrize("frozen_stages", [0, 1, 4])
def test_frozen_stages_count_as_parameters_but_not_as_trained(frozen_stages):
    config = tiny_config()
    model = dataclasses.replace(config.model, frozen_stages=frozen_stages)
    found = describe(dataclasses.replace(config, model=model), 3, (64, 64))
    backbone = found.modules["backbone"]
    stem, first = 49 * 3 * 4 + 8, 2 * (9 * 4 * 4 + 8)
    frozen = {0: 0, 1: stem + first, 4: backbone.parameters}[frozen_stages]
    assert backbone.parameters - backbone.trained == frozen
    assert found.total.parameters - found.total.trained == frozen


def test_dtype_and_rematerialization_do_not_change_the_description():
    config = tiny_config()
    plain = describe(config, 3, (64, 64))
    model = dataclasses.replace(config.model, dtype="bfloat16", remat=True)
    assert describe(dataclasses.replace(config, model=model), 3, (64, 64)) == plain


def test_table_shows_every_module_and_the_sum():
    lines = description_table(describe(tiny_config(), 3, (64, 96))).splitlines()
    assert lines[0] == "image of 64 x 96 pixels (height x width), 3 classes"
    assert [line.split()[0] for line in lines[3:8]] == [*MODULES, "total"]

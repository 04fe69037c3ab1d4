"""The training benchmark measures what it claims to; its speed is not tested."""

import dataclasses
import json

import numpy as np
import pytest

from ghm_jax.analysis.chips import peak_flops
from ghm_jax.analysis.cost import describe, training_operations
from ghm_jax.bench.train import (
    StepTime,
    TrainCase,
    growth,
    measure_train,
    random_batch,
)
from ghm_jax.cli import main

TINY = TrainCase(
    backbone="resnet10", padded_size=(32, 32), batch_size=2, dtype="float32", channels=8
)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_step_of_a_network_is_timed_by_its_stages():
    (network,) = measure_train(TINY, comparisons=("networks",), backbones=("resnet10",), repeats=2)
    assert network.ratio == network.processor_ratio == 1
    assert 0 < network.fastest <= network.milliseconds
    assert network.split is not None
    stages = sum(network.split[name] for name in ("forward", "loss", "optimizer", "backward"))
    assert stages == pytest.approx(network.milliseconds)
    operations = 2 * training_operations(TINY.config, 80, TINY.padded_size)
    assert network.teraflops * 1e9 * network.milliseconds == pytest.approx(operations)
    assert 0 < network.mfu < 1  # of a matrix product on this machine
    assert 0 < network.split["dispatch"] <= network.milliseconds
    assert network.memory > 4 * describe(TINY.config, 80, TINY.padded_size).total.parameters


def test_growth_is_the_slope_of_the_logarithms():
    def step(comparison, case, ratio):
        return StepTime(comparison, case, 1.0, 1.0, ratio, (1, 1), None, 1.0, 1.0, None, None, None)

    steps = [
        step("image", dataclasses.replace(TINY, padded_size=(32, 32 * n)), 3 * n) for n in (1, 2, 4)
    ]
    steps += [step("batch", dataclasses.replace(TINY, batch_size=n), 5 * n**0.5) for n in (1, 4)]
    steps[1] = dataclasses.replace(steps[1], ratio=99.0, processor_ratio=6.0)  # this one counts
    steps += [step("classes", TINY, 1.0)]  # a single size has no slope
    assert growth(steps) == pytest.approx({"image": 1.0, "batch": 0.5})


def test_boxes_of_a_random_batch_lie_in_the_image():
    batch = random_batch(dataclasses.replace(TINY, padded_size=(64, 160), num_classes=3))
    boxes, labels, is_crowd = batch.truth
    used = labels >= 0
    x0, y0, x1, y1 = np.moveaxis(boxes[used], -1, 0)
    assert used.any(axis=1).all()
    assert labels.max() < 3
    assert not is_crowd.any()
    assert ((x0 >= 0) & (x0 < x1) & (x1 <= 160) & (y0 >= 0) & (y0 < y1) & (y1 <= 64)).all()
    assert (boxes[~used] == 0).all()


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("Tesla T4", 65e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_the_device_kinds_of_jax(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_training_bench_prints_its_table_and_writes_it(tmp_path, capsys):
    out = tmp_path / "bench.json"
    settings = "--parts devices --backbones resnet10 --size 32 32 --batch-size 2 --channels 8"
    settings += " --devices 2 3 4096"  # 3 cannot share 2 images, 4096 do not exist
    main(["bench", "train", *settings.split(), "--repeats", "1", "--out", str(out)])
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["command"].startswith(f"ghm-jax bench train {settings}")
    cases = [(row["case"]["devices"], row["case"]["collectives"]) for row in record["rows"]]
    assert cases == [(2, True), (2, False)]
    assert {row["part"] for row in record["rows"]} == {"devices"}
    assert "resnet10 ghm_c 2 x 32 x 32 on 2" in printed
    assert record["growth"] == {}

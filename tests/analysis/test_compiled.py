"""Steps compiled for TPU slices; the compiler itself needs libtpu, everything else does not."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config

from ghm_jax.analysis.chips import TPUS
from ghm_jax.analysis.compiled import (
    Collective,
    CompiledStep,
    Memory,
    PartCost,
    find_slice,
    part_of,
)
from ghm_jax.cli import main
from ghm_jax.cli.tables import compiled_table
from ghm_jax.config import Run
from ghm_jax.exceptions import ArgumentError

needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu, the TPU compiler, is not installed"
)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2", "v5e:axb", "4x4", "v5e:2x2x"])
def test_a_name_of_no_slice_is_one_line_with_examples(name):
    with pytest.raises(ArgumentError, match="no TPU slice") as error:
        find_slice(name)
    assert "v5e:2x2" in str(error.value)


def test_without_the_compiler_there_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="libtpu") as error:
        find_slice("v5e:2x2")
    assert "pip install" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(f)/shard_map/jvp(RetinaNet)/backbone/backbone._stage/conv", "backbone"),
        ("jit(f)/transpose(jvp(RetinaNet))/class_head/conv1/conv", "class_head"),
        ("jit(f)/jvp(classification_loss)/mul", "classification_loss"),
        ("jit(f)/transpose(jvp(box_loss))/mul", "box_loss"),
        ("jit(f)/matching/while/body/max", "matching"),
        ("jit(f)/reduce_and", "other"),
        ("", "other"),
    ],
)
def test_a_scope_belongs_to_the_part_that_it_names(scope, part):
    assert part_of(scope) == part


def step(**changed) -> CompiledStep:
    memory = Memory(
        arguments=2**30, outputs=0, temporaries=2**31, code=0, chip=2**34, largest_batch=21
    )
    default = CompiledStep(
        topology="v5e:2x2",
        chips=4,
        hosts=1,
        program="train",
        wrapper="pmap",
        padded_size=(96, 128),
        batch_per_chip=3,
        memory=memory,
        parts={
            "backbone": PartCost(
                bytes=4_000_000, flops=8_000_000_000, seconds=0.002, copies=7, copied=1_500_000
            ),
            "fpn": PartCost(bytes=1_000_000, flops=0, seconds=0.001, copies=2, copied=250_000),
        },
        collectives=[Collective(kind="all-reduce", scope="gradients", count=1, bytes=1000)],
        compiler_flops=9e9,
        seconds={"compute": 0.002, "memory": 0.001, "links": 0.0},
        compile_seconds=12.3,
    )
    return dataclasses.replace(default, **changed)


def test_the_table_says_whether_it_fits_and_what_bounds_it():
    text = compiled_table(step())
    for words in ("4 chips", "3,072 MiB", "fits", "21 images", "2.000 ms", "6,000", "all-reduce"):
        assert words in text, words
    tight = dataclasses.replace(step().memory, temporaries=2**35)
    assert "DOES NOT FIT" in compiled_table(step(memory=tight))
    assert step().bound == 0.002


def test_the_table_lists_the_copies_of_each_part_and_their_sum():
    lines = {line.split()[0]: line.split() for line in compiled_table(step()).splitlines() if line}
    assert lines["backbone"][-3:] == ["7", "1.5", "MB"]
    assert lines["fpn"][-3:] == ["2", "0.2", "MB"]
    assert lines["step"][-3:] == ["9", "1.8", "MB"]
    assert step().as_record()["copies"] == 9


def test_published_limits_are_in_bytes_and_operations_per_second():
    for chip in TPUS:
        assert 100e12 < chip.flops < 1e15
        assert 16 * 2**30 <= chip.memory <= 95 * 2**30
        assert chip.link < chip.bandwidth < 3e12


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["pmap", "shard_map"])
def test_the_training_step_has_sums_and_no_collective_that_grows(tmp_path, wrapper):
    config = tiny_config(run=Run(wrapper=wrapper))
    (tmp_path / "tiny.py").write_text(f"from ghm_jax.config import *\nconfig = {config!r}\n")
    steps = [compiled_figures(tmp_path, images) for images in (1, 2)]
    sums = []
    for found in steps:
        assert found["fits"]
        assert found["chips"] == 4
        assert {"backbone", "matching", "classification_loss"} <= set(found["parts"])
        assert {c["kind"] for c in found["collectives"]} == {"all-reduce"}
        parts = found["parts"].values()
        assert all(part["copied"] <= part["bytes"] for part in parts)
        assert sum(part["copied"] for part in parts) > 0
        sums.append({c["scope"]: c["bytes"] for c in found["collectives"]})
        del sums[-1]["other"]  # ids of images that are not finite
    assert sums[0] == sums[1]  # gradients, histograms, sums: not of the batch


def compiled_figures(folder: Path, images: int) -> dict:
    """In a process of its own, as libtpu cannot be unloaded."""
    words = f"""describe tiny.py --topology v5e:2x2 --size 64 64 --classes 3
        --batch-per-chip {images} --out out.json"""
    code = "import sys; from ghm_jax.cli import main; main(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, *words.split()], check=True, cwd=folder)
    return json.loads((folder / "out.json").read_text())


def test_figures_are_written_for_a_compiled_step_only(tmp_path, capsys):
    experiment = tmp_path / "plain.py"
    experiment.write_text("from ghm_jax.config import Config\nconfig = Config()\n")
    with pytest.raises(SystemExit):
        main(["describe", str(experiment), "--classes", "2", "--out", str(tmp_path / "x.json")])
    assert "--topology" in capsys.readouterr().err

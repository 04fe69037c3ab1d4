"""An exported program, run in a process that has JAX and NumPy but nothing of this package."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import CATEGORIES, SIDE, Listener, tiny_batch

from ghm_jax.batch import LoadedBatch
from ghm_jax.evaluation.detector import Detector, restore_state
from ghm_jax.exceptions import UserError
from ghm_jax.export import export
from ghm_jax.runs.directory import load_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

OTHER_PROGRAM = """
import sys
import jax, jax.export, numpy as np

program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
inputs = np.load(sys.argv[2])
found = program.call(inputs["images"], inputs["image_size"])
np.savez(sys.argv[3], **{name: np.asarray(value) for name, value in found.items()})
loaded = {name.partition(".")[0] for name in sys.modules}
sys.exit(" ".join(loaded & {"ghm_jax", "flax", "optax", "cv2", "orbax"}) or None)
"""


@pytest.fixture(scope="module")
def run_dir(finished_run, tmp_path_factory):
    """A run that finds something: after six steps every score is low."""
    path = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(finished_run[0].path, path)
    config = json.loads((path / "config.json").read_text())
    config["predict"]["score_threshold"] = 0.0
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def exported(run_dir):
    """The files of a run's program for three images of 64 x 96, and the listener."""
    listener = Listener()
    out = run_dir.parent / "out"
    out.mkdir()
    size = (SIDE, SIDE + 32)
    files = export(run_dir, out / "run.stablehlo", batch_size=3, size=size, progress=listener)
    return files, listener


def test_the_program_finds_what_the_package_finds(run_dir, exported, rng, tmp_path):
    batch = tiny_batch(rng, 3)
    batch = batch._replace(images=np.pad(batch.images, ((0, 0), (0, 0), (0, 32), (0, 0))))
    batch.image_size[2] = 40, 64
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "outputs.npz"
    np.savez(inputs, images=batch.images, image_size=batch.image_size)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    subprocess.run(
        [sys.executable, "-c", OTHER_PROGRAM, exported[0][0], inputs, outputs],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    theirs = np.load(outputs)

    run, config = load_run(run_dir)
    device = jax.devices()[0]
    variables = restore_state(run, config, device).variables
    loaded = LoadedBatch(
        batch,
        scale=np.ones((3, 2), np.float32),
        offset=np.zeros((3, 2), np.float32),
        valid=np.ones(3, bool),
        dropped_boxes=np.zeros(3, np.int32),
        replaced=np.zeros(3, bool),
    )
    ours = Detector(config, len(config.data.classes), [device])(variables, loaded)
    assert (ours.labels >= 0).any()
    np.testing.assert_array_equal(theirs["labels"], ours.labels)
    np.testing.assert_array_equal(theirs["valid"], ours.labels >= 0)
    np.testing.assert_allclose(theirs["scores"], ours.scores, rtol=1e-5)
    np.testing.assert_allclose(theirs["boxes"], ours.boxes, rtol=1e-4, atol=1e-3)
    assert theirs["boxes"][2].max() <= 64  # clipped to the image, not to its padding


def test_what_a_caller_must_know_is_stored_next_to_it(exported):
    (program, notes), listener = exported
    assert [path.name for path in (program, notes)] == ["run.stablehlo", "run.stablehlo.json"]
    assert sorted(path.name for path in program.parent.iterdir()) == [program.name, notes.name]
    known = json.loads(notes.read_text())
    assert dict(zip(known["category_ids"], known["classes"], strict=True)) == CATEGORIES
    assert (known["batch"], known["height"], known["width"]) == (3, SIDE, SIDE + 32)
    assert (known["step"], known["platforms"]) == (6, ["cpu", "cuda", "tpu"])
    assert not listener.lines  # the data set is available: its own category ids

    read = jax.export.deserialize(bytearray(program.read_bytes()))
    assert read.platforms == tuple(known["platforms"])
    names = {*known["inputs"], *known["outputs"]}
    assert names == {"images", "image_size", "boxes", "scores", "labels", "valid"}
    shape = [f"{spec.dtype}{list(spec.shape)}" for spec in read.in_avals]
    assert shape == ["uint8[3, 64, 96, 3]", "int32[3, 2]"]


def test_invalid_shapes_are_refused_before_anything_is_written(finished_run, tmp_path):
    for settings, line in (
        ({"batch_size": 0}, "batch_size: must be positive, got 0"),
        ({"size": (64, 65)}, r"size: \(64, 65\) is not a height and width in multiples"),
        ({"platforms": ("cpu", "npu")}, r"platforms: got .*; choose from cpu, cuda, tpu"),
        ({"platforms": ()}, r"platforms: got .*; choose from cpu, cuda, tpu"),
    ):
        with pytest.raises(UserError, match=line):
            export(finished_run[0].path, tmp_path / "run.stablehlo", **settings)
    with pytest.raises(UserError, match=r"^size: .*w.safetensors holds weights only"):
        export(finished_run[0].path, tmp_path / "w.safetensors", size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_one_platform_is_enough(finished_run, tmp_path):
    path, _ = export(finished_run[0].path, tmp_path / "run.stablehlo", platforms=("cpu", "cpu"))
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu",)
    assert program.in_avals[0].shape == (1, SIDE, SIDE, 3)  # the run's bucket


def test_a_path_that_cannot_be_written_is_one_line(finished_run, tmp_path):
    (tmp_path / "run.stablehlo").mkdir()
    with pytest.raises(
        UserError, match=r"^out: .*run.stablehlo cannot be written \(.* is a directory"
    ):
        export(finished_run[0].path, tmp_path / "run.stablehlo")
    assert not list(tmp_path.glob("*.part"))

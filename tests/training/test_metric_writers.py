"""What TensorBoard and Weights & Biases receive: event files read back, and a fake service."""

import dataclasses
import importlib.util
import json
import struct
import sys
import types

import cv2
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tiny import Listener, tiny_config

from ghm_jax.config import to_dict
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.train import train
from ghm_jax.training.log import TrainingLog
from ghm_jax.training.metric_writers import TensorBoard, WeightsAndBiases, check_writers

RECORD = {
    **{"step": 7, "loss": 0.5, "learning_rate": 0.01},
    "ghm_c": {"counts": [90.0, 8.0, 2.0, 0.0], "weights": [0.1, 2.0, 7.0, 0.0]},
}
PICTURE = np.zeros((40, 60, 3), np.uint8)
PICTURE[:, :20] = (250, 120, 10)  # orange on the left


def events(directory):
    """Events of a directory's files: records of length, its checksum, data, their checksum."""
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event()
            event.ParseFromString(data[12 : 12 + length])
            yield event
            data = data[16 + length :]


def values(directory):
    """{(step, tag): value} of a directory."""
    return {(e.step, v.tag): v for e in events(directory) for v in e.summary.value}


@pytest.fixture
def wandb(monkeypatch):
    """A fake package that records its calls."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.asked, fake.logged, fake.finished, fake.broken = [], [], 0, False

    class Run:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, record):
            if fake.broken:
                raise RuntimeError("the service is gone")
            fake.logged.append(record)

        def finish(self):
            fake.finished += 1

    def init(**settings):
        fake.asked.append(settings)
        return Run()

    fake.init = init
    fake.Histogram = lambda np_histogram: ("histogram", *np_histogram)
    fake.Image = lambda picture: ("image", picture)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def with_wandb(config):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, wandb=True))


def test_tensorboard_gets_numbers_histograms_and_pictures(tmp_path):
    writer = TensorBoard(tmp_path, 6)
    writer.add("train", RECORD, {})
    writer.add("validation", {"step": 7, "AP": 0.25}, {"image_3": PICTURE})
    writer.close()
    found = values(tmp_path)
    assert found.keys() == {
        (7, tag)
        for tag in (
            *("train/loss", "train/learning_rate", "validation/AP", "validation/image_3"),
            *("ghm_c/gradient_norm", "ghm_c/gradient_norm_harmonized"),
        )
    }
    assert found[7, "validation/AP"].simple_value == 0.25
    norms = found[7, "ghm_c/gradient_norm"].histo
    assert (list(norms.bucket), norms.num) == ([90.0, 8.0, 2.0, 0.0], 100.0)
    assert list(norms.bucket_limit) == [0.25, 0.5, 0.75, 1.0]
    assert (norms.min, norms.max) == (0.0, 1.0)
    harmonized = found[7, "ghm_c/gradient_norm_harmonized"].histo
    assert list(harmonized.bucket) == pytest.approx([9.0, 16.0, 14.0, 0.0])
    image = found[7, "validation/image_3"].image
    assert (image.height, image.width) == (40, 60)
    pixels = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_allclose(pixels[20, 5], (10, 120, 250), atol=8)  # OpenCV: blue first


def test_a_resumed_run_makes_tensorboard_discard_later_steps(tmp_path):
    writer = TensorBoard(tmp_path, 6)
    writer.add("train", RECORD, {})
    (start,) = [event for event in events(tmp_path) if event.session_log.status]
    assert start.step == 7
    writer.close()


def test_weights_and_biases_gets_the_same_under_the_same_names(wandb, tmp_path):
    run, config = RunDirectory(tmp_path), tiny_config()
    writer = WeightsAndBiases(run, config)
    writer.add("train", RECORD, {})
    writer.add("validation", {"step": 7, "AP": 0.25}, {"image_3": PICTURE})
    writer.close()
    (asked,) = wandb.asked
    assert (asked["project"], asked["name"], asked["dir"]) == (
        *("ghm-jax", tmp_path.name),
        str(tmp_path),
    )
    assert asked["config"] == to_dict(config)
    trained, validated = wandb.logged
    assert trained["step"] == validated["step"] == 7
    assert trained["train/loss"] == 0.5
    kind, counts, edges = trained["ghm_c/gradient_norm"]
    assert (kind, list(counts), list(edges)) == (
        *("histogram", RECORD["ghm_c"]["counts"]),
        [0.0, 0.25, 0.5, 0.75, 1.0],
    )
    assert validated["validation/AP"] == 0.25
    assert validated["validation/image_3"][1] is PICTURE
    assert wandb.finished == 1
    tensorboard = TensorBoard(tmp_path / "board", 0)
    tensorboard.add("train", RECORD, {})
    tensorboard.close()
    assert {tag for _, tag in values(tmp_path / "board")} == trained.keys() - {"step"}


def test_a_resumed_run_is_one_run_in_weights_and_biases(wandb, tmp_path, monkeypatch):
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        WeightsAndBiases(RunDirectory(tmp_path / name), tiny_config())
    first, again, other = (asked["id"] for asked in wandb.asked)
    assert first == again != other
    assert all(asked["resume"] == "allow" for asked in wandb.asked)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    WeightsAndBiases(RunDirectory(tmp_path / "a"), tiny_config())
    assert wandb.asked[-1]["project"] == "mine"


def test_a_missing_package_is_an_error_before_the_run_begins(dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    config = with_wandb(tiny_config(dataset_dir))
    with pytest.raises(ConfigError, match=r'^run.wandb: .*pip install "ghm-jax\[wandb\]"') as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    check_writers(tiny_config())  # not needed otherwise


def test_a_missing_login_is_one_line_with_the_remedy(wandb, tmp_path):
    def init(**settings):
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login()")

    wandb.init = init
    with pytest.raises(ConfigError, match=r"^run.wandb: api_key not.*WANDB_MODE=offline") as error:
        WeightsAndBiases(RunDirectory(tmp_path), tiny_config())
    assert "\n" not in str(error.value)


def test_a_service_that_fails_does_not_end_the_training(wandb, tmp_path):
    listener = Listener()
    log = TrainingLog(RunDirectory(tmp_path), with_wandb(tiny_config()), 0, listener)
    log.evaluated(1, {"AP": 0.25}, {})

    wandb.broken = True
    for done in (2, 3):
        log.evaluated(done, {"AP": 0.25}, {})
    log.close()
    warnings = [line for line in listener.lines if "training continues" in line]
    assert warnings == [
        "Weights & Biases: cannot be written (the service is gone); training continues"
    ]
    assert [step for step, _ in values(tmp_path / "tensorboard")] == [1, 2, 3]


@pytest.mark.usefixtures("quick_compilation")
def test_an_evaluation_during_training_shows_images_with_their_boxes(wandb, dataset_dir, tmp_path):
    config = with_wandb(tiny_config(dataset_dir))
    settings = dataclasses.replace(config.run, eval_every=3)
    train(dataclasses.replace(config, run=settings), tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    found = values(run.tensorboard)
    steps = [step for step, tag in found if tag == "train/loss"]
    assert steps == [1, 2, 3, 4, 5, 6]
    pictures = {key: value for key, value in found.items() if "/image_" in key[1]}
    names = [{name for at, name in pictures if at == step} for step in (3, 6)]
    assert names[0] == names[1] <= {f"validation/image_{101 + 7 * i}" for i in range(6)}
    assert len(pictures) == 2 * 4
    assert all(len(value.image.encoded_image_string) < 150_000 for value in pictures.values())
    aps = [record["validation/AP"] for record in wandb.logged if "validation/AP" in record]
    history = [json.loads(line)["AP"] for line in run.evaluations.read_text().splitlines()]
    assert aps == history
    assert wandb.finished == 1

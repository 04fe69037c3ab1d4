"""What `ghm-jax stats` reports about a run, against NumPy in float64."""

import dataclasses
import functools
import json
import shutil

import cv2
import jax
import numpy as np
import pytest
from tiny import GHM_C, GHM_R, Listener

from ghm_jax.analysis.gradient_stats import DIFFICULTY, gradient_stats
from ghm_jax.cli import main
from ghm_jax.config import Loss, Run, to_dict
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import validation_batches
from ghm_jax.detection.outputs import loss_inputs
from ghm_jax.evaluate import evaluate
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.runs.directory import load_run
from ghm_jax.training.build import make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def run_with(finished_run, tmp_path):
    """A copy of the finished run with other sections in its config."""

    def copy(**sections):
        path = tmp_path / "run"
        shutil.copytree(finished_run[0].path, path)
        config = dataclasses.replace(load_run(path)[1], **sections)
        (path / "config.json").write_text(json.dumps(to_dict(config)))
        return path

    return copy


def seen_by_the_losses(run_dir):
    """Norms, hard targets and errors of the valid examples of the first batch, in float64."""
    run, config = load_run(run_dir)
    state = restore_state(run, config, jax.devices()[0])
    dataset = open_dataset(config.data, "validation")
    loaded = next(iter(validation_batches(dataset, config)))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    model = make_model(config, len(dataset.class_names))
    of_batch = jax.jit(functools.partial(loss_inputs, config=config, model=model))
    found = of_batch(variables, loaded.batch)
    logits, deltas, (classes, delta_targets) = jax.tree.map(np.asarray, found)
    p = 1 / (1 + np.exp(-np.float64(logits[classes > -2])))
    target = np.float64(classes[classes > -2][:, None] == np.arange(p.shape[1]))
    error = np.float64(deltas - delta_targets)[classes >= 0].ravel()
    return state.ghm, p.ravel(), target.ravel(), error


def histogram(norm, bins, values=None):
    return np.histogram(np.float32(norm), bins, (0, 1), weights=values)[0]


def share(values):
    return values / values.sum()


@pytest.mark.parametrize(("devices", "wrapper"), [(1, "pmap"), (4, "pmap")])
def test_histogram_weights_and_gradients_are_those_of_the_next_step(run_with, devices, wrapper):
    path = run_with(run=Run(devices=devices, wrapper=wrapper, workers=0))
    states, p, target, error = seen_by_the_losses(path)
    stats = gradient_stats(path, images=4)
    assert (stats["step"], stats["images"], stats["batch_size"]) == (6, 4, 4)

    focal = np.where(target == 1, 0.25 * (1 - p) ** 2, 0.75 * p**2)
    hard = np.where(target == 1, p, 1 - p)  # probability of the truth
    slope = np.abs(hard - 1) - 2 * hard * np.log(hard) * np.where(hard < 1, 1, 0)
    baseline = {"classification": focal * slope, "box": np.minimum(np.abs(error) * 9, 1)}
    norms = {
        "classification": np.abs(p - target),
        "box": np.abs(error) / np.sqrt(error**2 + 0.02**2),
    }
    names = {
        "classification": ("cross_entropy", "focal", "ghm_c"),
        "box": ("asl1", "smooth_l1", "ghm_r"),
    }
    for key, state in (("classification", states.classification), ("box", states.box)):
        part, (plain, common, ours) = stats[key], names[key]
        loss = load_run(path)[1].loss
        settings = loss.ghm_c if key == "classification" else loss.ghm_r
        momentum, floor = settings.momentum, settings.min_count
        norm, bins = norms[key], len(part["counts"])
        counts = histogram(norm, bins)
        np.testing.assert_allclose(part["counts"], counts, atol=1)  # float32 at an edge
        past, steps = np.float64(state.counts), int(state.step)
        np.testing.assert_allclose(part["ema"], past / (1 - momentum**steps), rtol=1e-5)
        average = (momentum * past + (1 - momentum) * counts) / (1 - momentum ** (steps + 1))
        density = np.maximum(average, floor)
        weights = average.sum() / (average / density).sum() / density
        filled = counts > 2
        found = np.array([np.nan if w is None else w for w in part["weights"]])
        assert (np.isnan(found) == (np.array(part["counts"]) == 0)).all()
        np.testing.assert_allclose(found[filled], weights[filled], rtol=2e-2)

        gradient = {
            plain: histogram(norm, bins, norm),
            common: histogram(norm, bins, baseline[key]),
            ours: histogram(norm, bins, norm) * weights,
        }
        assert list(part["gradient"]) == [plain, common, ours]
        for name, expected in gradient.items():
            np.testing.assert_allclose(part["gradient"][name], share(expected), atol=5e-3)
        groups = part["difficulty"]
        for name, (low, high) in DIFFICULTY.items():
            inside = (norm >= low) & ((norm < high) | (high == 1))
            assert groups[name]["examples"] == pytest.approx(inside.mean(), abs=5e-3)
            of_plain = norm[inside].sum() / norm.sum()
            assert groups[name]["gradient"][plain] == pytest.approx(of_plain, abs=5e-3)
        for name in gradient:
            assert sum(g["gradient"][name] for g in groups.values()) == pytest.approx(1)
        assert part["nonfinite"] == 0
    positive = histogram(np.abs(p - target)[target == 1], len(stats["classification"]["counts"]))
    np.testing.assert_allclose(stats["classification"]["positive_counts"], positive, atol=1)
    assert positive.sum() > 0


def test_a_shard_map_run_is_evaluated_on_several_devices(run_with):
    path = run_with(run=Run(devices=2, wrapper="shard_map", workers=0))
    assert evaluate(path).step == gradient_stats(path)["step"] == 6


def test_a_run_without_ghm_has_no_average_and_weights_of_mean_one(run_with):
    path = run_with(loss=Loss(classification="focal", box="smooth_l1", ghm_c=GHM_C, ghm_r=GHM_R))
    stats = gradient_stats(path)
    for key, loss in (("classification", "focal"), ("box", "smooth_l1")):
        part = stats[key]
        assert part["loss"] == loss
        assert part["ema"] is None
        assert len(part["gradient"]) == 2  # the run's loss is the baseline
        weights = np.array([w or 0.0 for w in part["weights"]])
        assert share(np.array(part["counts"])) @ weights == pytest.approx(1, rel=1e-5)
        assert np.ptp(weights[weights > 0]) > 0.01  # it does reweight


def test_an_incomplete_batch_is_used_only_if_it_is_the_only_one(run_with):
    path = run_with()
    listener = Listener()
    assert gradient_stats(path, images=99, progress=listener)["images"] == 4  # of six
    assert listener.steps == [4]
    assert gradient_stats(path, split="validation[:3]")["images"] == 3
    assert "gradients of step 6" in listener.lines[0]


def test_the_command_writes_what_it_prints(run_with, tmp_path, capsys, monkeypatch):
    path = run_with()
    monkeypatch.chdir(tmp_path)
    main(["stats", str(path), "--out", "new/folder"])
    out, _ = capsys.readouterr()
    stats = json.loads((tmp_path / "new/folder/stats.json").read_text())
    easy = stats["classification"]["difficulty"]["easy"]
    assert f"{100 * easy['examples']:.2f} %" in out
    assert "GHM-R (this run)" in out
    for name in ("stats_classes.png", "stats_boxes.png"):
        assert name in out
        picture = cv2.imread(str(tmp_path / "new" / "folder" / name))
        assert picture is not None
        assert picture.std() > 10
    main(["stats", str(path)])
    assert json.loads((path / "stats.json").read_text()) == stats

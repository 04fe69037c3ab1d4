"""What the README shows works as it stands there."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_snippet_of_the_readme_trains(rng):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    images = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    classes = jnp.asarray(rng.integers(-2, 3, 64), jnp.int32)
    box_targets = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
    params = {"logits": jnp.zeros((5, 3)), "deltas": jnp.zeros((5, 4))}

    def model(params, images):
        return images @ params["logits"], images @ params["deltas"]

    scope = {"model": model}
    exec(snippet, scope)
    states = scope["ghm_c"], scope["ghm_r"]
    plain = []
    for _ in range(20):
        (loss, (*states, stats)), grads = scope["step"](
            params, images, classes, box_targets, *states
        )
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)
        plain.append(float(stats.plain_loss))
        assert np.isfinite(loss)
    assert plain[-1] < plain[0]
    assert int(states[0].step) == 20


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_files_that_the_readme_links_to_exist(link):
    assert (Path(__file__).parents[1] / link).is_file()


def test_files_that_the_readme_names_exist():
    root = Path(__file__).parents[1]
    for name in re.findall(r"`((?:ghm_jax|experiments)/[\w/.]*)`", README):
        assert (root / name).exists(), name


def test_the_table_of_losses_is_the_measured_result():
    path = Path(__file__).parents[1] / "experiments/results/quickstart_losses.json"
    summary = json.loads(path.read_text())["summary"]
    for loss, row in (
        ("focal", "focal loss \\(0"),
        ("published", "GHM-C without"),
        ("floored", "GHM-C with `min"),
    ):
        (cells,) = re.findall(rf"^\| \**{row}.*$", README, re.MULTILINE)
        for figure in ("AP", "AP50", "AR100"):
            assert f"{summary[loss][figure]['mean']:.3f}" in cells


def test_the_table_of_times_is_the_measured_result():
    path = Path(__file__).parents[1] / "experiments/results/bench_losses.json"
    rows = json.loads(path.read_text())["rows"]
    for loss, row in (
        ("cross-entropy", "cross-entropy "),
        ("focal loss (optax)", r"focal loss \(optax"),
        ("GHM-C", "GHM-C\\*"),
        ("GHM-C exact", "GHM-C, exact"),
        ("GHM-C, published algorithm (torch)", "GHM-C, published"),
    ):
        (cells,) = re.findall(rf"^\| \**{row}.*$", README, re.MULTILINE)
        for measured in (r for r in rows if r["loss"] == loss):
            assert f"| {measured['milliseconds']:.0f} ms " in cells

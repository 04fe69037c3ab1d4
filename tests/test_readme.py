"""The snippet and the paths in the README work."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_snippet_in_the_readme_trains(rng):
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

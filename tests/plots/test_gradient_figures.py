"""What the paper's figures show, against the formulas in float64."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from ghm_jax import losses
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.plots import (
    gradient_norm_distribution,
    gradient_shares,
    gradient_totals,
    reformulated_box_gradients,
    reformulated_class_gradients,
)
from ghm_jax.runs.directory import load_run

COUNTS = np.array([120_000.0, 800, 90, 30, 7, 12, 4, 1, 2, 15])


def curves(figure):
    """Label -> x and y of a line."""
    (ax,) = figure.axes
    return {line.get_label(): np.float64(line.get_xydata()).T for line in ax.lines}


def stairs(figure):
    """Label -> heights of a step line that is not filled."""
    (ax,) = figure.axes
    return {p.get_label(): p.get_data().values for p in ax.patches if not p.get_fill()}


def harmonized(norm, counts, min_count):
    """Gradient norm over density, up to a constant."""
    index = np.floor(np.float64(norm) * len(counts)).astype(int)
    curve = norm / np.maximum(counts, min_count)[index]
    return curve / curve.max()


def test_the_distribution_shows_shares_and_a_gap_for_an_empty_bin():
    for log, expected in ((True, [0.9, np.nan, 0.1]), (False, [0.9, 0, 0.1])):
        figure = gradient_norm_distribution([900, 0, 100], "title", "g", log=log)
        (drawn,) = stairs(figure).values()
        np.testing.assert_allclose(drawn, expected)
        assert figure.axes[0].get_yscale() == ("log" if log else "linear")
        assert figure.axes[0].get_title("left") == "90 % in the first bin, 10 % in the last"


@pytest.mark.parametrize("min_count", [0.0, 25.0])
def test_class_gradients_follow_the_formulas(min_count):
    figure = reformulated_class_gradients({"a": {"batch_counts": COUNTS, "min_count": min_count}})
    drawn = curves(figure)
    g, plain = drawn["cross-entropy"]
    np.testing.assert_allclose(plain, g, rtol=1e-5)
    focal = g**2 * (2 * (1 - g) * -np.log(1 - g) + g)
    np.testing.assert_allclose(drawn["focal loss"][1], focal, rtol=2e-5)
    np.testing.assert_allclose(drawn["a"][1], harmonized(g, COUNTS, min_count), rtol=1e-4)
    (band,) = figure.axes[0].collections
    lower, upper = band.get_paths()[0].get_extents().get_points()[:, 1]
    assert lower == pytest.approx(0.25 * focal.min(), rel=1e-4)
    assert upper == pytest.approx(0.75 * focal.max(), rel=1e-4)


@pytest.mark.parametrize("mu", [0.02, 0.04])
def test_box_gradients_follow_the_formulas(mu):
    settings = {"batch_counts": COUNTS[::-1], "min_count": 5.0}
    drawn = curves(reformulated_box_gradients({"a": settings}, mu=mu))
    d, smooth = drawn["smooth L1"]
    np.testing.assert_allclose(smooth, np.minimum(9 * d, 1), rtol=1e-5)
    norm = d / np.sqrt(d**2 + mu**2)
    np.testing.assert_allclose(drawn[f"ASL1, μ = {mu:g}"][1], norm, rtol=1e-5)
    np.testing.assert_allclose(drawn["a"][1], harmonized(norm, COUNTS[::-1], 5.0), rtol=1e-4)
    assert d.max() == pytest.approx(0.2, abs=1e-3)


def test_a_curve_has_a_gap_where_the_histogram_is_empty():
    counts = np.array([100.0, 0, 5, 3])
    g, curve = curves(reformulated_class_gradients({"a": {"batch_counts": counts}}))["a"]
    np.testing.assert_array_equal(np.isnan(curve), (g > 0.25) & (g < 0.5))
    empty = reformulated_class_gradients({"a": {"batch_counts": np.zeros(4)}})
    assert np.isnan(curves(empty)["a"][1]).all()


def test_totals_are_sums_over_the_examples_of_each_bin(rng):
    bins = 8
    draw = functools.partial(rng.normal, -2, 2, (50, 3))
    logits = oracles.draw_off_edges(draw, oracles.sigmoid, bins)
    classes = rng.integers(-2, 3, 50)
    dense = classes[:, None] == np.arange(3)
    norm, used = np.abs(oracles.sigmoid(logits) - dense), np.repeat(classes != -2, 3)
    index = oracles.bin_of(norm, bins).ravel()[used]
    counts = np.bincount(index, minlength=bins) + 1.0  # of a larger batch

    def expected(gradient):
        return np.bincount(index, gradient.ravel()[used], bins)

    totals = jax.jit(gradient_totals, static_argnums=(0, 3))
    arguments = jnp.asarray(logits), jnp.asarray(classes, jnp.int32)
    plain = totals(losses.cross_entropy_loss, *arguments, bins)
    np.testing.assert_allclose(plain, expected(norm) / used.sum(), rtol=1e-5)
    ghm_c = functools.partial(
        losses.ghm_c_loss, bins=bins, batch_counts=jnp.asarray(counts, jnp.float32), min_count=0.0
    )
    weighted = expected(norm) / (bins * counts)  # equations 2, 9 and 11
    np.testing.assert_allclose(totals(ghm_c, *arguments, bins), weighted, rtol=1e-5)

    drawn = stairs(gradient_shares({"cross-entropy": plain, "GHM-C": weighted}))
    np.testing.assert_allclose(drawn["GHM-C"], weighted / weighted.sum())
    np.testing.assert_allclose(np.nansum(drawn["cross-entropy"]), 1)


@pytest.mark.filterwarnings("error")
def test_figures_draw_without_any_example(tmp_path):
    nothing = {"a": {"batch_counts": np.zeros(10)}}
    for i, figure in enumerate(
        (
            gradient_norm_distribution(np.zeros(10), "", ""),
            gradient_norm_distribution(np.zeros(10), "", "", log=False),
            reformulated_class_gradients(nothing),
            reformulated_box_gradients(nothing),
            gradient_shares({"a": np.zeros(10)}),
        )
    ):
        figure.savefig(tmp_path / f"{i}.png", dpi=40)


# The experiment


@pytest.fixture(scope="module")
def experiment():
    path = Path(__file__).parents[2] / "experiments/paper_figures.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_figures_are_drawn_from_a_run(finished_run, quick_compilation, experiment, tmp_path):
    experiment.main(str(finished_run[0].path), str(tmp_path), images=3)
    assert len({path.name for path in tmp_path.glob("figure[1-5]_*.png")}) == 5


def test_only_the_requested_images_are_measured(finished_run, quick_compilation, experiment):
    """Neither fillers of the last batch nor images beyond the limit count."""
    run, config = load_run(finished_run[0].path)
    variables = restore_state(run, config, jax.devices()[0]).variables

    def measure(logits, deltas, targets):
        return {"images": (targets.classes != -2).any(axis=1).sum()}

    for limit, expected in ((5, 5), (100, 6)):
        total, seen = experiment.sum_over_images(config, variables, limit, measure)
        assert total["images"] == seen == expected


def test_a_directory_that_is_not_a_run_is_refused_in_one_line(experiment, tmp_path):
    with pytest.raises(SystemExit, match="not a run"):
        experiment.main(str(tmp_path))

"""The figures of the paper: how gradient norms are distributed, and how each loss changes them.

Every curve is the gradient of a loss of `ghm_jax.losses` by `jax.grad`, with the weights of
training; no formula of a gradient is written here.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ghm_jax import losses
from ghm_jax.plots import figures
from ghm_jax.plots.figures import BLUE, GREEN, GREY, INK, MUTED, ORANGE

Loss = Callable[..., tuple[jax.Array, Any, losses.LossStats]]
"""A loss of `ghm_jax.losses` with its settings bound."""

_COLORS = (GREY, ORANGE, BLUE, GREEN, INK)


def gradient_norm_distribution(
    counts: np.ndarray, title: str, xlabel: str, *, log: bool = True
) -> Figure:
    """Share of the examples in each bin of gradient norm (figures 2 and 4 of the paper).

    Args:
        counts: [bins], examples in equal bins over [0, 1]: `stats.counts` of a GHM loss, or a sum
            of these.
        title: of the figure.
        xlabel: describes the gradient norm.
        log: logarithmic (figure 2, class scores) or linear axis (figure 4, boxes).
    """
    share = figures.shares(np.asarray(counts, np.float64))
    figure, ax = _figure(title, xlabel, f"share of the examples, {len(share)} bins")
    ends = f"{100 * share[0]:.3g} % in the first bin, {100 * share[-1]:.3g} % in the last"
    ax.set_title(ends, loc="left", color=MUTED, fontsize=9)
    edges = np.linspace(0.0, 1.0, len(share) + 1)
    ax.stairs(share, edges, fill=True, color=BLUE, alpha=0.2, lw=0)
    # On a logarithmic axis an empty bin is a gap.
    line = np.where(share > 0, share, np.nan) if log else share
    ax.stairs(line, edges, color=BLUE, lw=1.5, baseline=None)
    if log:
        figures.log_axis(ax, share, _power)
    else:
        figures.linear_axis(ax, 5)
        ax.yaxis.set_major_formatter(figures.percent)
    ax.set_xlim(0, 1)
    return figure


def reformulated_class_gradients(harmonized: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Gradients of cross-entropy, focal loss and GHM-C by gradient norm (figures 1 middle and 3).

    For cross-entropy they are equal. The line of focal loss (gamma 2) is without alpha, as in the
    paper; the band below it is for alpha 0.25, from positives (lower edge) to background. GHM-C is
    scaled to a maximum of 1, because its scale depends on the weight of the loss. It is
    discontinuous at the edges of bins and has gaps at empty bins.

    Args:
        harmonized: label -> settings of `ghm_c_loss`: `batch_counts` f[bins], the histogram to
            harmonize, and others such as `min_count`.
    """
    norm = _grid(1.0, 300)
    logits = np.log(norm / (1 - norm))  # of background
    unweighted = reformulated_gradient(losses.cross_entropy_loss, logits, 0.0)
    focal = functools.partial(losses.focal_loss, alpha=None)
    curves = {
        "cross-entropy": unweighted,
        "focal loss": reformulated_gradient(focal, logits, 0.0),
        **_harmonized_curves(losses.ghm_c_loss, harmonized, logits, unweighted),
    }
    figure, ax = _figure(
        "Gradient of each loss",
        "gradient norm g = |p − p*|",
        "gradient (GHM-C scaled to a maximum of 1)",
    )
    background = reformulated_gradient(losses.focal_loss, logits, 0.0)
    positive = reformulated_gradient(losses.focal_loss, -logits, 1.0)
    _lines(ax, norm, curves)
    ax.fill_between(norm, positive, background, color=ORANGE, alpha=0.2, lw=0)
    note = "band: focal loss with α = 0.25,\npositives (lower edge) to background"
    ax.text(0.98, positive[150] / 3, note, color=ORANGE, fontsize=8.5, ha="right", va="top")
    _legend(ax)
    figures.log_axis(ax, np.concatenate([*curves.values()]), _power)
    ax.set_xlim(0, 1)
    return figure


def reformulated_box_gradients(
    harmonized: Mapping[str, Mapping[str, Any]], *, mu: float = 0.02, reach: float = 0.2
) -> Figure:
    """Gradients of smooth L1, ASL1 and GHM-R by the error of a box delta (figure 5).

    GHM-R is scaled to a maximum of 1. The curves printed in the paper are those of mu 0.04 (its
    ASL1 is 0.78 at |d| = 0.05), although the text says 0.02: use 0.04 to compare with the paper.

    Args:
        harmonized: label -> settings of `ghm_r_loss` except `mu`: `batch_counts` f[bins], the
            histogram to harmonize, and others such as `min_count`.
        mu: of ASL1 and GHM-R.
        reach: the largest |d|.
    """
    error = _grid(reach, 1200)
    norm = reformulated_gradient(functools.partial(losses.asl1_loss, mu=mu), error, 0.0)
    ghm_r = functools.partial(losses.ghm_r_loss, mu=mu)
    curves = {
        "smooth L1": reformulated_gradient(losses.smooth_l1_loss, error, 0.0),
        f"ASL1, μ = {mu:g}": norm,
        **_harmonized_curves(ghm_r, harmonized, error, norm),
    }
    figure, ax = _figure(
        "Gradient of each box loss",
        "error |d| of a coordinate, as a box delta",
        "gradient (GHM-R scaled to a maximum of 1)",
    )
    _lines(ax, error, curves)
    _legend(ax)
    figures.linear_axis(ax, 6)
    ax.set_xlim(0, reach)
    return figure


def gradient_shares(totals: Mapping[str, np.ndarray]) -> Figure:
    """Which examples contribute the gradient of a batch, by loss (figure 1 right).

    Args:
        totals: label -> f[bins], the `gradient_totals` of a loss, shown as shares of their sum. In
            the order cross-entropy, focal loss, GHM-C the colors are those of
            `reformulated_class_gradients`.
    """
    bins = max((len(total) for total in totals.values()), default=0)
    figure, ax = _figure(
        "Where the gradient comes from",
        "gradient norm g = |p − p*|",
        f"share of the total gradient, {bins} bins",
    )
    draw_gradient_shares(ax, totals)
    _legend(ax)
    return figure


def draw_gradient_shares(ax: Axes, totals: Mapping[str, Any]) -> None:
    """The lines of `gradient_shares` on given axes."""
    shares = {key: figures.shares(np.asarray(total, np.float64)) for key, total in totals.items()}
    for (label, share), color in zip(shares.items(), _COLORS, strict=False):
        edges = np.linspace(0.0, 1.0, len(share) + 1)
        drawn = np.where(share > 0, share, np.nan)
        ax.stairs(drawn, edges, color=color, lw=1.6, baseline=None, label=label)
    figures.log_axis(ax, np.concatenate([*shares.values()]), figures.percent)
    ax.set_xlim(0, 1)


def gradient_totals(loss: Loss, logits: jax.Array, targets: jax.Array, bins: int) -> jax.Array:
    """f32[bins]: the sum of |d loss / d logit| over the examples in each bin of gradient norm.

    Args:
        loss: of class scores.
        logits: float[..., K].
        targets: as for the loss.
        bins: number of equal bins over [0, 1].
    """

    def gradient(value: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jnp.abs(jax.grad(value)(logits.astype(jnp.float32))).ravel()

    def unweighted(x: jax.Array) -> jax.Array:
        mean, _, stats = losses.cross_entropy_loss(x, targets)
        return mean * stats.num_valid

    contribution = gradient(lambda x: loss(x, targets)[0])
    return jnp.histogram(gradient(unweighted), bins, range=(0, 1), weights=contribution)[0]


def reformulated_gradient(loss: Loss, values: np.ndarray, target: float) -> np.ndarray:
    """f32[n]: |d loss / d value|, where each of the values [n] is a separate example.

    Multiplied by the number of examples that the loss divides by, which is not 1 if the loss uses
    the histogram of a batch.
    """

    def of_one(value: jax.Array) -> jax.Array:
        mean, _, stats = loss(value, jnp.full_like(value, target))
        return mean * stats.num_valid

    return np.abs(jax.jit(jax.vmap(jax.grad(of_one)))(jnp.asarray(values, jnp.float32)))


def _harmonized_curves(
    loss: Loss, harmonized: Mapping[str, Mapping[str, Any]], values: np.ndarray, norm: np.ndarray
) -> dict[str, np.ndarray]:
    """label -> gradient [n], scaled to a maximum of 1; NaN at empty bins."""
    curves = {}
    for label, settings in harmonized.items():
        counts = np.asarray(settings["batch_counts"], np.float32)
        how = {**settings, "batch_counts": jnp.asarray(counts), "bins": len(counts)}
        curve = reformulated_gradient(functools.partial(loss, **how), values, 0.0)
        index = np.minimum((norm * len(counts)).astype(int), len(counts) - 1)
        curve = np.where(counts[index] > 0, curve, np.nan)
        curves[label] = curve / np.nanmax(curve, initial=0.0) if (counts > 0).any() else curve
    return curves


def _grid(reach: float, points: int) -> np.ndarray:
    """Midpoints: they avoid 0, where a logit would be infinite, and usually the edges of bins."""
    return (np.arange(points) + 0.5) / points * reach


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(figures.WIDTH, 3.9), dpi=figures.DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold")
    ax = figure.subplots()
    figures.style(ax, "", ylabel)
    ax.set_xlabel(xlabel, color=INK, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    ax.xaxis.set_major_formatter(figures.plain)
    return figure, ax


def _lines(ax: Axes, x: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
    for (label, curve), color in zip(curves.items(), _COLORS, strict=False):
        ax.plot(x, curve, color=color, lw=1.6, label=label)


def _legend(ax: Axes) -> None:
    """In rows between title and axes: never covers data, and labels may be long."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.3,
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.6,
    )


def _power_of_ten(value: float, _: Any) -> str:
    exponent = round(np.log10(value))
    if exponent == 0:
        return "1"
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


_power = FuncFormatter(_power_of_ten)

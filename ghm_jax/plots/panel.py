"""A tall figure of the gradient statistics (`ghm_jax.analysis.gradient_stats`) of each loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ghm_jax.plots import figures
from ghm_jax.plots.figures import BLUE, GREEN, GREY, INK, MUTED, ORANGE
from ghm_jax.plots.gradients import draw_gradient_shares

_LOSS_NAMES = {
    "cross_entropy": "cross-entropy",
    "focal": "focal loss",
    "ohem": "OHEM",
    "ghm_c": "GHM-C",
    "asl1": "ASL1",
    "smooth_l1": "smooth L1",
    "ghm_r": "GHM-R",
}


def loss_name(loss: str) -> str:
    """The display name of a loss of a config; for `module:function` the function's."""
    return _LOSS_NAMES.get(loss, loss.rpartition(":")[2])


# A moving average never quite forgets bins that have become empty: lower counts are not drawn.
_TRACE = 0.01

_TITLES = {
    "classification": ("Class scores", "gradient norm |p − p*| of an anchor and class"),
    "box": ("Boxes", "gradient norm of a coordinate of a positive anchor"),
}


def stats_panel(term: str, stats: Mapping[str, Any], batch_size: int, title: str = "") -> Figure:
    """Examples, weights and gradient per bin of gradient norm, and gradient by difficulty.

    Args:
        term: of the loss, "classification" or "box".
        stats: of that term, from `ghm_jax.analysis.gradient_stats.gradient_stats`.
        batch_size: images per batch.
        title: of the figure; empty: the term and the run's loss.
    """
    what, xlabel = _TITLES[term]
    figure = Figure(figsize=(figures.WIDTH, 10.0), dpi=figures.DPI, layout="constrained")
    title = title or f"{what}: {loss_name(stats['loss'])}"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold")
    axes = figure.subplots(4, 1, height_ratios=(1.3, 0.9, 1.2, 1.2))

    _examples(axes[0], stats, batch_size)
    _weights(axes[1], stats["weights"])
    figures.style(axes[2], "Total gradient", "share")
    draw_gradient_shares(axes[2], _named(stats["gradient"]))
    figures.legend(axes[2])
    for ax in axes[:3]:
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(figures.plain)
    axes[2].set_xlabel(xlabel, color=INK, fontsize=9)
    _difficulty(axes[3], stats["difficulty"])
    figure.align_ylabels(axes)
    return figure


def _examples(ax: Axes, stats: Mapping[str, Any], batch_size: int) -> None:
    counts = np.asarray(stats["counts"], np.float64)
    edges = np.linspace(0.0, 1.0, len(counts) + 1)
    ax.stairs(counts, edges, fill=True, color=GREY, alpha=0.45, lw=0, label="examples")
    drawn = [counts]
    lines = (("positive_counts", "positive", GREEN), ("ema", "moving average", BLUE))
    for key, label, color in lines:
        if stats.get(key) is not None:
            values = np.asarray(stats[key], np.float64)
            line = np.where(values > _TRACE, values, np.nan)
            ax.stairs(line, edges, color=color, lw=1.5, baseline=None, label=label)
            drawn.append(values)
    figures.style(ax, "Examples", f"per batch of {batch_size} images")
    shown = np.concatenate(drawn)
    figures.log_axis(ax, shown[shown > _TRACE], _COUNT)
    figures.legend(ax)


def _weights(ax: Axes, weights: Sequence[float | None]) -> None:
    values = np.array([np.nan if w is None else w for w in weights], np.float64)
    values = np.where(values > 0, values, np.nan)
    edges = np.linspace(0.0, 1.0, len(values) + 1)
    ax.stairs(values, edges, color=ORANGE, lw=1.8, baseline=None)
    ax.axhline(1.0, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    figures.style(ax, "Mean weight of an example (dashed: unweighted)", "weight")
    figures.log_axis(ax, np.append(values[np.isfinite(values)], 1.0), figures.times)


def _difficulty(ax: Axes, difficulty: Mapping[str, Mapping[str, Any]]) -> None:
    """Labeled bars of the share of examples and gradient by difficulty."""
    rows = {"examples": [group["examples"] for group in difficulty.values()]}
    losses = next(iter(difficulty.values()))["gradient"]
    for loss in losses:
        rows[loss_name(loss)] = [group["gradient"][loss] for group in difficulty.values()]
    # Pale for examples, then the losses in the colors they have above.
    colors = ("#c4cad1", GREY, ORANGE, BLUE)
    width = 0.86 / len(rows)
    places = np.arange(len(difficulty))
    for i, ((label, values), color) in enumerate(zip(rows.items(), colors, strict=False)):
        x = places + (i - (len(rows) - 1) / 2) * width
        ax.bar(x, values, 0.92 * width, color=color, label=label)
        for at, value in zip(x, values, strict=True):
            text = "" if value == 0 else "<0.1" if value < 0.001 else f"{100 * value:.2g}"
            text = "100" if value > 0.995 else text
            ax.text(at, value + 0.015, text, ha="center", fontsize=6.5, color=MUTED)
    figures.style(ax, "Difficulty", "%")
    ax.set_ylim(0, 1.12)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    ax.grid(False, axis="x")
    names = [f"{k}\n{g['range'][0]:g} to {g['range'][1]:g}" for k, g in difficulty.items()]
    ax.set_xticks(places, names)
    figures.legend(ax, columns=4)


def _named(gradient: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    return {loss_name(key): np.asarray(values) for key, values in gradient.items()}


def _short(value: float, _: Any) -> str:
    for factor, unit in ((1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


_COUNT = FuncFormatter(_short)

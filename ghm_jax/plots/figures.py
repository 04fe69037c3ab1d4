"""Curves of a run and histograms of gradient norms, as matplotlib figures.

Uses `Figure` objects instead of pyplot: no global state, nothing to close.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ghm_jax.losses.density import shares

# Text and grid; the report replaces these three by the color scheme of the page.
INK = "#24292f"
MUTED = "#656d76"
GRID = "#d8dee4"
# Series: mid-tones that are readable on white and on dark gray.
BLUE = "#2f81f7"
ORANGE = "#e0702e"
GREEN = "#2da46c"
GREY = "#8c959f"

DPI = 220
_RECENT = 10  # log records that a histogram is averaged over
WIDTH = 5.4  # inches: the text keeps a readable size on a phone


def loss_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """The losses, the plain errors that show progress, and the learning rate over steps.

    A harmonized loss stays flat by construction (GHM-C near 1), so progress shows in the plain mean
    cross-entropy and the plain mean box loss. With many records a running mean is drawn over the
    raw values.

    Args:
        history: records with `step`, `loss`, `loss_class`, `loss_box`, `cross_entropy`,
            `box_error`, `learning_rate`; missing values are gaps.
    """
    figure = Figure(figsize=(WIDTH, 6.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(1.3, 1, 1, 0.7))
    panels = (
        (
            "Loss",
            "loss",
            (
                ("loss", "total", INK),
                ("loss_class", "classes", BLUE),
                ("loss_box", "boxes", ORANGE),
            ),
        ),
        ("Plain cross-entropy", "nats per example", (("cross_entropy", "", BLUE),)),
        ("Plain box error", "loss per coordinate", (("box_error", "", ORANGE),)),
        ("Learning rate", "learning rate", (("learning_rate", "", GREEN),)),
    )
    steps = _column(history, "step")
    for ax, (title, unit, lines) in zip(axes, panels, strict=True):
        values = [_column(history, key) for key, _, _ in lines]
        for y, (key, label, color) in zip(values, lines, strict=True):
            _curve(ax, steps, y, color, label, smooth=key != "learning_rate")
        style(ax, title, unit)
        if title == "Learning rate":
            linear_axis(ax, 3)
        else:
            _value_axis(ax, np.concatenate(values))
        if len(lines) > 1:
            legend(ax)
    axes[-1].set_xlabel("training step", color=INK, fontsize=9)
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.align_ylabels(axes)
    return figure


def harmonizing_panel(
    counts: np.ndarray | Sequence[float],
    weights: np.ndarray | Sequence[float],
    title: str,
    xlabel: str,
) -> Figure:
    """The distribution of gradient norms before and after harmonizing, and the weights.

    Before: the share of the examples in each bin. After: the share of the total weight, that is
    counts * weights, normalized. It is flat over the bins above the density floor.

    Args:
        counts: f32[bins], examples in equal bins over [0, 1].
        weights: f32[bins], mean weight of the examples in each bin; ignored for empty bins.
        title: of the figure; may be empty.
        xlabel: describes the gradient norm.
    """
    counts = np.asarray(counts, np.float64)
    filled = counts > 0
    weights = np.where(filled, np.asarray(weights, np.float64), 0.0)
    before, after = shares(counts), shares(counts * weights)
    edges = np.linspace(0.0, 1.0, len(counts) + 1)

    figure = Figure(figsize=(WIDTH, 4.9), dpi=DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold")

    top.stairs(before, edges, fill=True, color=GREY, alpha=0.45, lw=0, label="before: examples")
    top.stairs(
        after,
        edges,
        color=BLUE,
        lw=1.8,
        baseline=None,
        label="after: examples \N{MULTIPLICATION SIGN} weight",
    )
    style(top, "Share by bin", "share")
    log_axis(top, np.concatenate([before, after]), percent)
    legend(top)

    drawn = np.where(filled & (weights > 0), weights, np.nan)
    bottom.stairs(drawn, edges, color=ORANGE, lw=1.8, baseline=None)
    bottom.axhline(1.0, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    style(bottom, "Mean weight of an example (dashed: unweighted)", "weight")
    log_axis(bottom, np.append(drawn[np.isfinite(drawn)], 1.0), times)
    bottom.set_xlabel(xlabel, color=INK, fontsize=9)
    bottom.set_xlim(0, 1)
    figure.align_ylabels((top, bottom))
    return figure


def recent_histogram(
    history: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray, list[int]] | None:
    """The histogram `key` averaged over the last ten records that have it.

    Returns:
        Mean counts f64[bins]; mean weight of an example f64[bins] (0 for empty bins), such that
        counts * weights is the mean of counts * weights over the records; the steps averaged over.
        None if no record has the histogram.
    """
    records = [record for record in history if record.get(key)]
    if not records:
        return None
    bins = len(records[-1][key]["counts"])
    records = [record for record in records[-_RECENT:] if len(record[key]["counts"]) == bins]
    counts = np.array([record[key]["counts"] for record in records], np.float64)
    weights = np.array([record[key]["weights"] for record in records], np.float64)
    weighted = np.where(counts > 0, counts * weights, 0.0).mean(axis=0)
    counts = counts.mean(axis=0)
    mean = np.divide(weighted, counts, out=np.zeros_like(counts), where=counts > 0)
    return counts, mean, [record["step"] for record in records]


def _column(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    values = (record.get(key) for record in history)
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _curve(
    ax: Axes, steps: np.ndarray, y: np.ndarray, color: str, label: str, *, smooth: bool
) -> None:
    window = len(y) // 40 if smooth and len(y) >= 200 else 1
    # A single point makes no line.
    marker = "o" if np.isfinite(y).sum() == 1 else None
    if window > 1:
        ax.plot(steps, y, color=color, lw=0.6, alpha=0.3)
        y = _running_mean(y, window)
    ax.plot(steps, y, color=color, lw=1.5, label=label, marker=marker)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in a centered window, which is shorter at the ends."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * (window // 2) + 1)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    count = np.convolve(finite, kernel, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def style(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title, loc="left", color=INK, fontsize=9.5, pad=5)
    ax.set_ylabel(unit, color=MUTED, fontsize=8.5)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=0, which="both")
    ax.grid(True, color=GRID, lw=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)


def legend(ax: Axes, columns: int = 3) -> None:
    """Above the axes at the right, level with the title: never covers data."""
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.1,
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _value_axis(ax: Axes, values: np.ndarray) -> None:
    """Logarithmic if the values span more than a factor of ten, else linear."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 10 * positive.min():
        log_axis(ax, positive, plain)
    else:
        linear_axis(ax, 4)


def linear_axis(ax: Axes, ticks: int) -> None:
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(ticks, steps=(1, 2, 2.5, 5, 10)))
    ax.yaxis.set_major_formatter(plain)


def log_axis(ax: Axes, values: np.ndarray, formatter: FuncFormatter) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        ax.text(0.5, 0.5, "no examples", transform=ax.transAxes, ha="center", color=MUTED)
        ax.set_ylim(0, 1)
        ax.set_yticks([])
        return
    low, high = positive.min(), positive.max()
    ax.set_yscale("log")
    ax.set_ylim(low / 1.6, high * 1.6)
    subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    ax.yaxis.set_major_formatter(formatter)
    ax.yaxis.set_minor_locator(NullLocator())


# Plain numbers instead of powers of ten: in an SVG they are text as well.
plain = FuncFormatter(lambda value, _: f"{value:g}")
percent = FuncFormatter(lambda value, _: f"{100 * value:g} %")
times = FuncFormatter(lambda value, _: f"\N{MULTIPLICATION SIGN} {value:g}")

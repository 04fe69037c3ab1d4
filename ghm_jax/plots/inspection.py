"""Pictures of training batches and of their statistics."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ghm_jax.batch import Batch
from ghm_jax.plots.drawing import draw_boxes
from ghm_jax.plots.figures import BLUE, DPI, GREY, INK, MUTED, WIDTH, plain, style

_CELL = 480  # long side of an image in the grid, pixels
_GAP = 6
_GAP_COLOR = (208, 215, 222)  # not black like padding
_CLASSES = 20  # bars; the remaining classes share one


def batch_picture(batch: Batch, class_names: Sequence[str], columns: int = 4) -> np.ndarray:
    """The images of a batch with their boxes in a grid; padding is black.

    Args:
        batch: in host memory.
        class_names: names in label order.
        columns: images per row.

    Returns:
        uint8[H, W, 3].
    """
    # Crowd regions are drawn as an additional class.
    names, crowd = [*class_names, "crowd"], len(class_names)
    cells = []
    for image, boxes, labels, is_crowd in zip(batch.images, *batch.truth, strict=True):
        shown = (labels >= 0) | is_crowd
        labels = np.where(is_crowd, crowd, labels)[shown]
        scale = _CELL / max(image.shape[:2])
        cells.append(draw_boxes(image, boxes[shown], labels, names, scale=scale))
    columns = min(columns, len(cells))
    height, width = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    grid = np.empty(
        (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), dtype=np.uint8
    )
    grid[:] = _GAP_COLOR
    for i, cell in enumerate(cells):
        y, x = i // columns * (height + _GAP), i % columns * (width + _GAP)
        grid[y : y + height, x : x + width] = cell
    return grid


def statistics_figure(
    quantities: Mapping[str, np.ndarray], class_counts: Mapping[str, int], title: str
) -> Figure:
    """Histograms of quantities with dashed medians, and the number of boxes by class.

    Quantities that span more than a factor of fifty get a logarithmic axis.

    Args:
        quantities: values by name with unit.
        class_counts: number of boxes by class name, in the order to draw.
        title: of the figure.
    """
    rows = -(-(len(quantities)) // 2)
    bars = _class_bars(class_counts)
    heights = [1.6] * rows + [0.5 + 0.17 * len(bars)]
    figure = Figure(figsize=(1.3 * WIDTH, 0.6 + sum(heights)), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=heights)
    for i, (name, values) in enumerate(quantities.items()):
        ax = figure.add_subplot(grid[i // 2, i % 2])
        style(ax, name, "")
        if not len(values):
            ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", color=MUTED)
            continue
        _histogram(ax, values)
    ax = figure.add_subplot(grid[rows, :])
    style(ax, "Boxes by class", "")
    ax.barh(list(bars), list(bars.values()), color=BLUE, height=0.7)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _histogram(ax: Axes, values: np.ndarray) -> None:
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    if low > 0 and high > 50 * low:
        edges = np.geomspace(low, high, 31)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(plain)
    elif np.all(values == np.round(values)):  # integers: bins of equal integer width
        width = max(1, round((high - low) / 30))
        edges = np.arange(low - 0.5, high + width + 0.5, width)
    else:
        edges = np.linspace(low, high, 31) if high > low else np.array([low - 0.5, low + 0.5])
    counts, edges = np.histogram(values, edges)
    ax.stairs(counts, edges, fill=True, color=GREY, alpha=0.6)
    ax.axvline(np.median(values), color=INK, lw=1.0, ls=(0, (4, 3)))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _class_bars(counts: Mapping[str, int]) -> dict[str, int]:
    names = list(counts)
    bars = {name: counts[name] for name in names[:_CLASSES]}
    if len(names) > _CLASSES:
        bars[f"{len(names) - _CLASSES} more"] = sum(counts[name] for name in names[_CLASSES:])
    return bars

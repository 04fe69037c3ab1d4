"""Pictures of a run: boxes on images, curves and histograms, and the report with all of them."""

from ghm_jax.plots.drawing import Sample, class_color, draw_boxes, sample_grid
from ghm_jax.plots.figures import harmonizing_panel, loss_curves
from ghm_jax.plots.gradients import (
    gradient_norm_distribution,
    gradient_shares,
    gradient_totals,
    reformulated_box_gradients,
    reformulated_class_gradients,
)
from ghm_jax.plots.report import render_report

__all__ = [
    "Sample",
    "class_color",
    "draw_boxes",
    "gradient_norm_distribution",
    "gradient_shares",
    "gradient_totals",
    "harmonizing_panel",
    "loss_curves",
    "reformulated_box_gradients",
    "reformulated_class_gradients",
    "render_report",
    "sample_grid",
]

"""Table 2: what harmonizing costs. Cross-entropy, GHM-C by exact density and by bins.

    ghm-jax train experiments/paper/table2.py:region_units --data.dir data

`published` is the paper's AP on minival and its seconds per training iteration on a GTX 1080 Ti.
Not measured here; `ghm-jax bench losses` times the losses and `ghm-jax bench train` the step.

A "unit region" of the paper is a bin. The width of the exact density's window is not printed: here
it is that of one of the 30 bins.

Estimated, not run: 7 hours per row on one A100 at an MFU of 30 %, excluding the loss of `exact`.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.runs.experiments import load_experiment

base = load_experiment(Path(__file__).with_name("recipe.py"))
loss = replace(base.loss, box="smooth_l1")

configs = {
    # The paper scales the loss by 20 so that it starts near 1. A mean over all levels starts at
    # -log(1 - 0.01), which needs 100; the sum of one mean for each of five levels would need 20.
    "cross_entropy": replace(
        base, loss=replace(loss, classification="cross_entropy", weight=100.0)
    ),
    "exact": replace(base, loss=replace(loss, ghm_c=replace(loss.ghm_c, density="exact"))),
    "region_units": replace(base, loss=loss),
}

published = {
    "cross_entropy": {"AP": 28.6, "seconds": 0.566},
    "exact": {"AP": 35.9, "seconds": 13.675},
    "region_units": {"AP": 35.8, "seconds": 0.824},
}

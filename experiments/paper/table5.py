"""Table 5: box losses, with GHM-C for the classes.

    ghm-jax train experiments/paper/table5.py:ghm_r --data.dir data

`published` is the paper's AP on minival. Not measured here.

Estimated, not run: 7 hours per row on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.runs.experiments import load_experiment

base = load_experiment(Path(__file__).with_name("recipe.py"))

configs = {
    "smooth_l1": replace(base, loss=replace(base.loss, box="smooth_l1")),
    "asl1": replace(base, loss=replace(base.loss, box="asl1")),
    "ghm_r": base,
}

published = {
    "smooth_l1": {"AP": 35.8, "AP50": 55.5, "AP75": 38.1, "APs": 19.6, "APm": 39.6, "APl": 46.7},
    "asl1": {"AP": 35.7, "AP50": 55.0, "AP75": 38.1, "APs": 19.7, "APm": 39.7, "APl": 45.9},
    "ghm_r": {"AP": 36.4, "AP50": 54.6, "AP75": 38.7, "APs": 20.5, "APm": 40.6, "APl": 47.8},
}

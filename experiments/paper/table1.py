"""Table 1: how many bins GHM-C needs. Smooth L1 for the boxes, no moving average.

    ghm-jax train experiments/paper/table1.py:bins_30 --data.dir data

`published` is the paper's AP on minival. Not measured here.

Estimated, not run: 7 hours per row on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.config import Config
from ghm_jax.runs.experiments import load_experiment

base = load_experiment(Path(__file__).with_name("recipe.py"))
loss = replace(base.loss, box="smooth_l1")


def with_bins(bins: int) -> Config:
    """The recipe with that many bins and no moving average."""
    ghm_c = replace(loss.ghm_c, bins=bins, momentum=0.0)
    return replace(base, loss=replace(loss, ghm_c=ghm_c))


configs = {f"bins_{bins}": with_bins(bins) for bins in (5, 10, 20, 30, 40)}

published = {
    "bins_5": {"AP": 33.4, "AP50": 51.7, "AP75": 35.6, "APs": 18.6, "APm": 36.8, "APl": 45.7},
    "bins_10": {"AP": 34.6, "AP50": 53.9, "AP75": 36.5, "APs": 19.5, "APm": 37.1, "APl": 46.1},
    "bins_20": {"AP": 35.2, "AP50": 54.4, "AP75": 36.9, "APs": 19.4, "APm": 38.4, "APl": 46.3},
    "bins_30": {"AP": 35.8, "AP50": 55.5, "AP75": 38.1, "APs": 19.6, "APm": 39.6, "APl": 46.7},
    "bins_40": {"AP": 35.4, "AP50": 54.8, "AP75": 36.3, "APs": 19.5, "APm": 38.5, "APl": 46.3},
}

"""What the authors' code and its successor mmdetection train, where they differ from the paper.

    ghm-jax train experiments/paper/published_code.py:ghm --data.dir data

12 epochs with learning-rate drops after 8 and 11, and other losses: one call per pyramid level,
summed, that share one moving histogram; division by the number of non-empty bins; momentum 0.7 for
GHM-R. The rows with GHM are the recipes `coco_*_ghm.py` in the parent folder.

`published` is AP on val2017, from the README of libuyu/GHM_Detection for focal, ghm_c and ghm, and
from mmdetection's model zoo for the others (it has 37.0 for ghm as well). Not measured here. Their
code keeps a histogram per GPU (2 images); here it is over all replicas.

Estimated, not run: 6 to 12 hours per row on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.runs.experiments import load_experiment


def recipe(name: str):
    """A recipe of the parent folder."""
    return load_experiment(Path(__file__).parents[1] / f"{name}.py")


base = recipe("coco_r50_ghm")
smooth_l1 = replace(base.loss, box="smooth_l1")

configs = {
    "focal": replace(base, loss=replace(smooth_l1, classification="focal")),
    "ghm_c": replace(base, loss=smooth_l1),
    "ghm": base,
    "ghm_r101": recipe("coco_r101_ghm"),
    "ghm_x101_32x4d": recipe("coco_x101_32x4d_ghm"),
    "ghm_x101_64x4d": recipe("coco_x101_64x4d_ghm"),
}

published = {
    "focal": {"AP": 35.6},
    "ghm_c": {"AP": 35.8},
    "ghm": {"AP": 37.0},
    "ghm_r101": {"AP": 39.1},
    "ghm_x101_32x4d": {"AP": 40.7},
    "ghm_x101_64x4d": {"AP": 41.4},
}

"""What the authors' code and its successor mmdetection train, where they differ from the paper.

    ghm-jax train experiments/paper/published_code.py:ghm --data.dir data

12 epochs with learning-rate drops after 8 and 11, and the reference losses: one call per pyramid
level, summed, that share one moving histogram; division by the number of non-empty bins; momentum
0.7 for GHM-R. `coco_r50_ghm.py` in the parent folder is the same recipe with this package's own
losses (one histogram, a floor).

`published` is AP on val2017, from the README of libuyu/GHM_Detection for focal, ghm_c and ghm, and
from mmdetection's model zoo for the others (it has 37.0 for ghm as well). Not measured here. Their
code keeps a histogram per GPU (2 images); here it is over all replicas.

Estimated, not run: 6 to 12 hours per row on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.config import REFERENCE, Harmonizing, Loss
from ghm_jax.runs.experiments import load_experiment

base = load_experiment(Path(__file__).parents[1] / "coco_r50_ghm.py")
loss = Loss(
    ghm_c=Harmonizing(bins=30, momentum=0.75, **REFERENCE),
    ghm_r=Harmonizing(bins=10, momentum=0.7, **REFERENCE),
    ghm_scope="level",
)
base = replace(base, loss=loss)
# mmdetection sums over the four coordinates of a box, this package averages: hence the 4.
smooth_l1 = replace(base.loss, box="smooth_l1", box_weight=4.0)


def backbone(name: str, weights: str):
    """The recipe with another backbone."""
    model = replace(base.model, backbone=name, weights=f"hf://timm/{weights}")
    return replace(base, model=model)


configs = {
    "focal": replace(base, loss=replace(smooth_l1, classification="focal")),
    "ghm_c": replace(base, loss=smooth_l1),
    "ghm": base,
    "ghm_r101": backbone("resnet101", "resnet101.tv_in1k"),
    "ghm_x101_32x4d": backbone("resnext101_32x4d", "resnext101_32x4d.gluon_in1k"),
    "ghm_x101_64x4d": backbone("resnext101_64x4d", "resnext101_64x4d.gluon_in1k"),
}

published = {
    "focal": {"AP": 35.6},
    "ghm_c": {"AP": 35.8},
    "ghm": {"AP": 37.0},
    "ghm_r101": {"AP": 39.1},
    "ghm_x101_32x4d": {"AP": 40.7},
    "ghm_x101_64x4d": {"AP": 41.4},
}

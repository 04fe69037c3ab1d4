"""Table 3: single models on COCO test-dev, the rows that are RetinaNets.

    ghm-jax train experiments/paper/table3.py:ghm_x101 --data.dir data

`published` is the paper's AP on test-dev, whose annotations are not public: detections must be sent
to the evaluation server. Not measured here. The rows for Faster R-CNN, Mask R-CNN, YOLOv3 and
DSSD513 are other detectors, which this package does not have.

The rows of focal loss are from its own paper, which trained 1.5 times as long and with scale
jitter; these configs do not use jitter, so they are not expected to reach the published AP.

Estimated, not run: 9 to 19 hours per row on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.runs.experiments import load_experiment

base = load_experiment(Path(__file__).with_name("recipe.py"))
focal = replace(
    base,
    # The papers sum over the four coordinates of a box, this package averages: hence the 4.
    loss=replace(base.loss, classification="focal", box="smooth_l1"),
    optimizer=replace(base.optimizer, steps=135_000, drops=(90_000, 120_000)),
)
r101 = replace(base.model, backbone="resnet101", weights="hf://timm/resnet101.tv_in1k")
x101 = replace(
    base.model, backbone="resnext101_32x8d", weights="hf://timm/resnext101_32x8d.tv_in1k"
)

configs = {
    "focal_r101": replace(focal, model=r101),
    "focal_x101": replace(focal, model=x101),
    "ghm_r101": replace(base, model=r101),
    "ghm_x101": replace(base, model=x101),
}

published = {
    "focal_r101": {"AP": 39.1, "AP50": 59.1, "AP75": 42.3, "APs": 21.8, "APm": 42.7, "APl": 50.2},
    "focal_x101": {"AP": 40.8, "AP50": 61.1, "AP75": 44.1, "APs": 24.1, "APm": 44.2, "APl": 51.2},
    "ghm_r101": {"AP": 39.9, "AP50": 60.8, "AP75": 42.5, "APs": 20.3, "APm": 43.6, "APl": 54.1},
    "ghm_x101": {"AP": 41.6, "AP50": 62.8, "AP75": 44.2, "APs": 22.3, "APm": 45.1, "APl": 55.3},
}

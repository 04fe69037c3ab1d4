"""The recipe of coco_r50_ghm.py with a ResNet-101.

    ghm-jax train experiments/coco_r101_ghm.py --data.dir data

Published (mmdetection's model zoo): 39.1 AP on val2017. Not measured here.
Estimated, not run: 8 hours on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.runs.experiments import load_experiment

base = load_experiment(Path(__file__).with_name("coco_r50_ghm.py"))
config = replace(
    base,
    model=replace(base.model, backbone="resnet101", weights="hf://timm/resnet101.tv_in1k"),
)

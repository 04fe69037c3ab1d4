"""The recipe of coco_r50_ghm.py with a ResNeXt-101-32x4d.

    ghm-jax train experiments/coco_x101_32x4d_ghm.py --data.dir data

Published (mmdetection's model zoo): 40.7 AP on val2017. Not measured here.
Estimated, not run: 8 hours on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.runs.experiments import load_experiment

base = load_experiment(Path(__file__).with_name("coco_r50_ghm.py"))
config = replace(
    base,
    model=replace(
        base.model, backbone="resnext101_32x4d", weights="hf://timm/resnext101_32x4d.gluon_in1k"
    ),
)

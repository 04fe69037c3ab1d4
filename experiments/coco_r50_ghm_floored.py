"""The recipe of coco_r50_ghm.py with this package's own losses: one histogram, with a floor.

    ghm-jax train experiments/coco_r50_ghm_floored.py --data.dir data

One histogram and one mean for all pyramid levels, as in the paper, a bias-corrected moving average,
and no bin counted as less than a hundred examples. The weights of the losses give gradients of the
published size, see docs/losses.md.

No AP is published for it, none is measured here.
Estimated, not run: 6 hours on one A100 at an MFU of 30 %.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.config import Loss
from ghm_jax.runs.experiments import load_experiment

config = replace(load_experiment(Path(__file__).with_name("coco_r50_ghm.py")), loss=Loss())

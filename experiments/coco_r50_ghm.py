"""RetinaNet-R50 with GHM-C and GHM-R on COCO, 12 epochs: the published code's recipe.

    ghm-jax data prepare coco/2017 --source DIR_OF_UNPACKED_OFFICIAL_FILES --out data
    ghm-jax train experiments/coco_r50_ghm.py --data.dir data

Published for this recipe from ImageNet weights: 37.0 AP on val2017 (mmdetection's model zoo).
Not measured here: no COCO figure of this package exists yet. Until weights can be imported, the
backbone starts at random with GroupNorm, which needs a longer schedule than 12 epochs.
"""

from ghm_jax.config import Config, Model

config = Config(model=Model(backbone="resnet50", norm="group"))

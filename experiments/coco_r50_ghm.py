"""RetinaNet-R50 with GHM-C and GHM-R on COCO, 12 epochs: the published code's recipe.

    ghm-jax data prepare coco/2017 --source DIR_OF_UNPACKED_OFFICIAL_FILES --out data
    ghm-jax train experiments/coco_r50_ghm.py --data.dir data

It starts from ImageNet weights on the Hugging Face Hub (pip install "ghm-jax[hub]"), or from a file
of torchvision's or timm's: --model.weights resnet50-0676ba61.pth.

Published (mmdetection's model zoo): 37.0 AP on val2017. Not measured here.
Estimated, not run: 6 hours on one A100 at an MFU of 30 %.
"""

from ghm_jax.config import Config, Model

config = Config(
    # The stem and the first stage keep their ImageNet weights; all norms keep their statistics.
    model=Model(
        backbone="resnet50",
        weights="hf://timm/resnet50.tv_in1k",
        norm="frozen",
        frozen_stages=1,
    ),
)

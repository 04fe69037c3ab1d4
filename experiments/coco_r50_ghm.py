"""RetinaNet-R50 with GHM-C and GHM-R on COCO, 12 epochs: the published code's recipe and losses.

    ghm-jax data prepare coco/2017 --source DIR_OF_UNPACKED_OFFICIAL_FILES --out data
    ghm-jax train experiments/coco_r50_ghm.py --data.dir data

It starts from ImageNet weights on the Hugging Face Hub (pip install "ghm-jax[hub]"), or from a file
of torchvision's or timm's: --model.weights resnet50-0676ba61.pth.

The losses are those of the published code: a call for each pyramid level, added up, that share one
moving histogram. Its histograms are of the two images of one GPU, here they are of all replicas.
`coco_r50_ghm_floored.py` is the same recipe with this package's own losses.

Published (mmdetection's model zoo): 37.0 AP on val2017. Not measured here.
Estimated, not run: 6 hours on one A100 at an MFU of 30 %.
"""

from ghm_jax.config import REFERENCE, Config, Harmonizing, Loss, Model

config = Config(
    # The stem and the first stage keep their ImageNet weights; all norms keep their statistics.
    model=Model(
        backbone="resnet50",
        weights="hf://timm/resnet50.tv_in1k",
        norm="frozen",
        frozen_stages=1,
    ),
    loss=Loss(
        ghm_c=Harmonizing(bins=30, momentum=0.75, **REFERENCE),
        ghm_r=Harmonizing(bins=10, momentum=0.7, **REFERENCE),
        ghm_scope="level",
    ),
)

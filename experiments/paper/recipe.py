"""The paper's own recipe: RetinaNet-R50 with GHM-C and GHM-R as printed, 14 epochs of COCO.

    ghm-jax data prepare coco/2017 --source DIR_OF_UNPACKED_OFFICIAL_FILES --out data
    ghm-jax train experiments/paper/recipe.py --data.dir data

Published: 36.4 AP on minival (tables 5 and 6). Not measured here. The other files of this folder
are variations of this one: `ghm-jax train experiments/paper/table1.py:bins_30 --data.dir data`.
What the authors' code does differently is in published_code.py.

As printed: 800 pixels, flips, 16 images per step, SGD with momentum 0.9, learning rate 0.01 and
weight decay 1e-4, the rate divided by 10 after epochs 9 and 12 of 14; 30 bins, momentum 0.75 of the
histogram, division by all bins, one histogram for all levels, mu 0.02. train2017 holds the images
of the paper's trainval35k, and val2017 those of its minival.

Not printed, so taken from the authors' code: warm-up, clipping, frozen batch norms and stages,
matching, 10 bins for GHM-R, and the weights of the losses. Ours: histograms over all replicas.

Estimated, not run: 7 hours on one A100 at an MFU of 30 %.
"""

from dataclasses import replace

from ghm_jax.config import Config, Harmonizing, Loss, Model, Optimizer

EPOCH = 7330  # steps of 16 images

printed = Harmonizing(
    bins=30,
    momentum=0.75,  # "for all experiments"
    normalizer="bins",
    bias_correction=False,  # equation 12 has none
    min_count=0.0,
)
config = Config(
    model=Model(
        backbone="resnet50",
        weights="hf://timm/resnet50.tv_in1k",
        norm="frozen",
        frozen_stages=1,
    ),
    loss=Loss(ghm_c=printed, ghm_r=replace(printed, bins=10), mu=0.02),
    optimizer=Optimizer(steps=14 * EPOCH, drops=(9 * EPOCH, 12 * EPOCH)),
)

"""Quickstart: a small RetinaNet learns handwritten digits with GHM-C and GHM-R, on two CPU cores.

    ghm-jax train experiments/quickstart.py && ghm-jax evaluate runs/quickstart

The same code path as COCO; only sizes differ. Expected: see README.md.
"""

from ghm_jax.config import Anchors, Config, Data, Loss, Model, Optimizer, Run

config = Config(
    data=Data(
        name="digit_scenes",
        short_side=160,
        long_side=160,
        buckets=((160, 160),),
        max_boxes=24,
        flip=0.0,  # a mirrored digit is no digit
    ),
    model=Model(
        backbone="resnet18",
        width=16,
        norm="batch",
        channels=32,
        head_convs=1,
        dtype="float32",
    ),
    anchors=Anchors(scale=2.0),  # most digits are smaller than 32 pixels
    loss=Loss(
        # The published loss (min_count=0) fails on data this small: bins that hold a handful of
        # examples, other ones at each step, get as much of the gradient as those with thousands.
        # The floor treats a bin with fewer than 100 of the 390,000 examples as if it had 100.
        min_count=100,
    ),
    optimizer=Optimizer(
        name="adamw",
        batch_size=8,
        steps=2000,
        learning_rate=2e-3,
        weight_decay=1e-4,
        warmup_steps=100,
        warmup_factor=0.1,
        schedule="cosine",
    ),
    run=Run(workers=0, log_every=20, checkpoint_every=500),
)

"""Quickstart: a small RetinaNet learns handwritten digits with GHM-C and GHM-R, on two CPU cores.

    ghm-jax train experiments/quickstart.py && ghm-jax evaluate runs/quickstart

The same code path as COCO; only sizes differ. Expected time and result: docs/results.md.
"""

from ghm_jax.config import Anchors, Config, Data, Harmonizing, Loss, Model, Optimizer, Predict, Run

config = Config(
    data=Data(
        name="digit_scenes",
        short_side=160,
        long_side=160,
        buckets=((160, 160),),
        max_boxes=20,
        flip=0.0,  # a mirrored digit is not a digit
    ),
    model=Model(
        backbone="resnet10",
        width=24,
        stem_kernel=3,
        norm="group",
        channels=48,
        head_convs=1,
        head_norm="group",
        dtype="float32",
    ),
    # Digits are taller than wide, 16 to 72 pixels high: sizes from 14 to 56 cover them.
    anchors=Anchors(scale=1.75, octaves=2, ratios=(1.0, 1.5, 2.2)),
    loss=Loss(
        # The results in docs/results.md are with these; the defaults would be 4 and 40.
        weight=3.0,
        box_weight=10.0,
        # The published loss (min_count=0) fails on data this small: bins that hold a handful of
        # examples, a different handful every step, get as much of the gradient as bins with
        # thousands. The floor treats a bin with fewer than 100 of the 130,000 examples as if it
        # had 100.
        ghm_c=Harmonizing(min_count=100),
        # With the published 0.02 most errors of so short a training are outliers to GHM-R.
        mu=0.1,
    ),
    optimizer=Optimizer(
        name="adamw",
        batch_size=4,
        steps=2400,
        learning_rate=4e-3,
        weight_decay=1e-4,
        warmup_steps=100,
        warmup_factor=0.1,
        schedule="cosine",
    ),
    predict=Predict(batch_size=10),
    run=Run(workers=0, log_every=20, checkpoint_every=500),
)

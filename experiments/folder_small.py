"""A RetinaNet small enough for two CPU cores, on a data set of your own.

    ghm-jax data prepare folder --name mine --out data --train IMAGES JSON --validation IMAGES JSON
    ghm-jax train experiments/folder_small.py --data.dir data

For a first result without an accelerator, and for objects that a reduced image still shows: images
are scaled to 256 x 320 pixels. `folder.py` is the larger one.
"""

from ghm_jax.config import Config, Data, Harmonizing, Loss, Model, Optimizer, Predict, Run

config = Config(
    data=Data(
        name="",  # the only data set in data.dir
        short_side=256,
        long_side=320,
        buckets=((256, 320), (320, 256), (320, 320)),
    ),
    model=Model(
        backbone="resnet10",
        width=24,
        norm="group",
        channels=48,
        head_convs=1,
        head_norm="group",
        dtype="float32",
    ),
    # After docs/study.md: a floor and a `mu` for short runs. Where a batch has few objects, choose
    # the weight for your data: eight times as much was best for the circuit boards there.
    loss=Loss(weight=3.0, box_weight=10.0, ghm_c=Harmonizing(min_count=1000), mu=0.1),
    optimizer=Optimizer(
        name="adamw",
        batch_size=4,
        steps=1500,
        learning_rate=4e-3,
        weight_decay=1e-4,
        warmup_steps=100,
        warmup_factor=0.1,
        schedule="cosine",
    ),
    predict=Predict(batch_size=8),
    run=Run(workers=0, log_every=20, checkpoint_every=500),
)

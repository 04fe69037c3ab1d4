"""RetinaNet-R18 from scratch on a data set that `ghm-jax data prepare folder` made.

    ghm-jax data prepare folder --name mine --out data --train IMAGES JSON --validation IMAGES JSON
    ghm-jax train experiments/folder.py --data.dir data

A starting point for a few hundred to a few thousand images: set the number of steps to about
20 times the number of images divided by the batch size, and the image sizes to what your objects
need.
"""

from ghm_jax.config import Config, Data, Model, Optimizer

config = Config(
    data=Data(
        name="",  # the only data set in data.dir
        short_side=512,
        long_side=640,
        buckets=((512, 640), (640, 512), (640, 640)),
    ),
    model=Model(backbone="resnet18", norm="group", channels=128),
    optimizer=Optimizer(
        name="adamw",
        batch_size=8,
        steps=5000,
        learning_rate=5e-4,
        weight_decay=1e-4,
        schedule="cosine",
    ),
)

"""The recipe of coco_r50_ghm.py with longer schedules, more images per step, and float32.

    ghm-jax train experiments/coco_r50_schedules.py:2x --data.dir data

1x, 2x and 3x are 12, 24 and 36 epochs with activations in bfloat16, the default. `large_batch` is
1x with 256 images per step for a pod or many GPUs: the learning rate grows in proportion to the
batch (Goyal et al., 2017), and so does the share of the run that is warm-up, here an epoch.
`one_device` is 1x on a device that holds two images at a time, with losses and histograms of all
16. `ema` is 1x that evaluates a moving average of the weights.

`published` is mmdetection's AP of RetinaNet-R50 with focal loss on val2017 for the same schedule,
the 3x with multi-scale training, which this file does not use: no results of GHM beyond 1x are
published. Not measured here.

Estimated, not run: 6 (1x) to 18 hours (3x) on one A100 at an MFU of 30 %, 12 in float32.
"""

from dataclasses import replace
from pathlib import Path

from ghm_jax.config import Config
from ghm_jax.runs.experiments import load_experiment

IMAGES = 117_280  # per epoch, in whole steps of 16
base = load_experiment(Path(__file__).with_name("coco_r50_ghm.py"))


def schedule(drops: tuple[int, int], epochs: int, batch_size: int = 16) -> Config:
    """The recipe for `epochs`, the rate divided by 10 after each epoch of `drops`."""
    optimizer = replace(
        base.optimizer,
        batch_size=batch_size,
        steps=epochs * IMAGES // batch_size,
        drops=tuple(epoch * IMAGES // batch_size for epoch in drops),
        learning_rate=base.optimizer.learning_rate * batch_size / base.optimizer.batch_size,
    )
    return replace(base, optimizer=optimizer)


large = schedule((8, 11), 12, batch_size=256)
configs = {
    "1x": schedule((8, 11), 12),
    "2x": schedule((16, 22), 24),
    "3x": schedule((28, 34), 36),
    "float32": replace(base, model=replace(base.model, dtype="float32")),
    "large_batch": replace(large, optimizer=replace(large.optimizer, warmup_steps=458)),
    "one_device": replace(base, optimizer=replace(base.optimizer, accumulate=8)),
    "ema": replace(base, optimizer=replace(base.optimizer, ema=0.9998)),
}

published = {"1x": {"AP": 36.5}, "2x": {"AP": 37.4}, "3x": {"AP": 39.5}}

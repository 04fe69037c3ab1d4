# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: jupytext,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a detector
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# A small RetinaNet learns to detect handwritten digits, with the two gradient-harmonized losses:
# GHM-C for the classes and GHM-R for the boxes. You see the data, the imbalance that these losses
# address, the training, what harmonizing did to the gradients, the COCO metrics, and detections on
# images that the network has never seen.
#
# It is `make quickstart` in cells: the same functions with the same settings. It takes a few
# minutes on two CPU cores; a GPU or TPU is used if there is one.
#
# (The badge opens Colab's GitHub tab: paste the address of this repository there.)

# %%
# Installs only what is missing; in an environment that has ghm_jax it does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # to run this file on its own, as on Colab: where to clone the repository from

here = Path.cwd()
places = (here, *here.parents, here / "checkout")
root = next((path for path in places if (path / "experiments/quickstart.py").is_file()), None)
if root is None:
    if not REPOSITORY:
        raise SystemExit(f"{here} is in no checkout of ghm_jax: set REPOSITORY to its address")
    root = here / "checkout"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, root], check=True)
if not all(importlib.util.find_spec(name) for name in ("ghm_jax", "hotcoco")):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{root}[detector]"], check=True)
    importlib.invalidate_caches()

# %% [markdown]
# ## Settings
#
# Everything that decides a run's result is in one `config`, and an experiment file is a Python file
# that defines it. The quickstart differs from the defaults, which are those for COCO, in these
# fields. To try something else, use `dataclasses.replace`.

# %%
import os
from dataclasses import replace

import jax

from ghm_jax.config import Config, differences
from ghm_jax.distributed.devices import use_cpu_cores
from ghm_jax.runs.experiments import load_experiment

config = load_experiment(root / "experiments/quickstart.py")
config = replace(config, data=replace(config.data, dir=str(root / "data")))

if os.environ.get("GHM_NOTEBOOK_SMOKE"):  # the tests run the same cells, in seconds
    config = replace(
        config,
        data=replace(config.data, short_side=64, long_side=64, buckets=((64, 64),)),
        model=replace(config.model, width=8, channels=8),
        optimizer=replace(config.optimizer, steps=4, warmup_steps=1),
        predict=replace(config.predict, candidates=20, max_detections=10),
        run=replace(config.run, log_every=1),
    )

# Before JAX computes anything: a CPU counts as one device, unless asked to be one per core.
use_cpu_cores((config.optimizer.batch_size, config.predict.batch_size))

print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}\n")
print(f"{'setting':<25}{'here':<16}for COCO")
for key, (for_coco, value) in differences(Config(), config).items():
    print(f"{key:<25}{value!s:<16}{for_coco}")

# %% [markdown]
# ## Data
#
# `digit_scenes` places real scans of handwritten digits, at very different sizes, on textured
# backgrounds. It is built in seconds on first use and has the structure of TFDS `coco/2017`.
# Training and validation scenes use different scans.

# %%
import io

import numpy as np
import PIL.Image
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from ghm_jax.data import open_dataset, train_batches
from ghm_jax.plots import draw_boxes


def show(picture: Figure | np.ndarray, kind: str = "png") -> None:
    """Displays a figure ("jpeg" if it holds photographs), or an image uint8[H, W, 3]."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format=kind, dpi=110)
    else:
        image = PIL.Image.fromarray(picture)
        image.thumbnail((1100, 1100))
        image.save(buffer, format="jpeg", quality=75)
    display(Image(buffer.getvalue()))


scenes = open_dataset(config.data, config.data.train_split)
batches = train_batches(scenes, config, start_step=0)
batch = next(batches).batch  # what the first step of training sees
batches.close()

print(f"{len(scenes):,} scenes; a batch:")
boxes, labels, _ = batch.truth
for name, array in (("images", batch.images), ("boxes", boxes), ("labels", labels)):
    print(f"  {name:<8}{array.dtype}{list(array.shape)}")


def draw_scene(i: int) -> np.ndarray:
    """A scene of the batch with its boxes."""
    real = labels[i] >= 0  # the rest is padding
    return draw_boxes(batch.images[i], boxes[i][real], labels[i][real], scenes.class_names, scale=4)


gap = ((0, 0), (0, 16), (0, 0))
show(np.hstack([np.pad(draw_scene(i), gap, constant_values=255) for i in range(3)]))

# %% [markdown]
# ## Anchors, and which are positive
#
# RetinaNet lays a fixed grid of anchor boxes over the image and scores every anchor for every
# class. An anchor that overlaps a digit well is positive, and so is the best one for each digit: it
# learns the digit's class and box. Anchors that overlap a little less are ignored, and all others
# are background.

# %%
from matplotlib.patches import Rectangle

from ghm_jax.detection.anchors import make_anchors
from ghm_jax.detection.matching import IGNORE
from ghm_jax.detection.outputs import make_targets
from ghm_jax.plots import class_color

settings = config.anchors
size = batch.images.shape[1:3]
anchors = make_anchors(size, settings.scale, settings.octaves, settings.ratios)  # [A, 4]
classes = np.asarray(make_targets(batch, config).classes)  # [B, A]

figure = Figure(figsize=(10.8, 5.4), layout="constrained")
for ax, i in zip(figure.subplots(1, 2), (0, 1), strict=True):
    positive = np.flatnonzero(classes[i] >= 0)
    ax.imshow(batch.images[i])
    for anchor in positive:
        x0, y0, x1, y1 = anchors[anchor]
        color = np.array(class_color(classes[i, anchor])) / 255
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=color, lw=1.2))
    ax.set_title(f"{len(positive)} of {len(anchors):,} anchors are positive", fontsize=11)
    ax.set_axis_off()
show(figure, "jpeg")

examples = int((classes != IGNORE).sum()) * len(scenes.class_names)
positives = int((classes >= 0).sum())
print(f"(anchor, class) pairs in the batch    {examples:>9,}")
print(f"of these positive                     {positives:>9,}   one in {examples / positives:,.0f}")

# %% [markdown]
# ## Why harmonize the gradients
#
# Each of these pairs is an example for the classification loss. Nearly all of them are plain
# background that the network soon gets right: each has a tiny gradient, but there are so many of
# them that together they outweigh the few that matter. At the other end are examples that it gets
# entirely wrong and may never get right, such as an anchor between two digits; each of them has the
# largest gradient possible.
#
# GHM uses the gradient norm of an example, $g = |p - p^*|$: how far the probability is from the
# target. It counts how many examples have about the same norm and **divides the weight of an
# example by that density**. Examples that are abundant, very easy or very hard, count less, and
# every bin of norms gets its share of the gradient. GHM-C does so for class scores, GHM-R for the
# four box coordinates of positive anchors.
#
# **The density floor.** Dividing by a density fails where there is hardly anything to count. A bin
# that happens to hold three examples would give these three as much weight as another gives to its
# thousands, and a different three at the next step: single examples would steer the network. On a
# small data set with small batches this happens all the time. So `loss.ghm_c.min_count = 100`
# treats a bin of fewer than 100 examples as if it held 100. This bounds every weight and leaves
# well-filled bins to the published rule; `min_count = 0` is the published loss.

# %% [markdown]
# ## Train
#
# Every step runs on all devices at once, and the histograms of gradient norms are summed over them:
# GHM sees the whole batch. Interrupting the cell writes a checkpoint; running it again resumes from
# there, and a finished run is left as it is. `restart=True` moves an old run aside and trains from
# scratch.

# %%
from ghm_jax.progress import Bar
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.train import train

run = RunDirectory(root / "runs/notebook")
state = train(config, run.path, progress=Bar())

# %% [markdown]
# ## What harmonizing did
#
# Grey is the share of examples in each bin of gradient norm, as the network produces them; the
# scale is logarithmic. Blue is the share of the total weight after harmonizing, and orange the
# weight of an example, which is the ratio of the two. The blue line is level where a bin holds more
# examples than the floor, and falls off where it holds fewer.

# %%
from ghm_jax.plots import harmonizing_panel, loss_curves
from ghm_jax.plots.figures import recent_histogram
from ghm_jax.runs.history import read_history

history = read_history(run.history)
for key, title, norm in (
    ("ghm_c", "GHM-C: class scores", "gradient norm |p - p*| of a class score"),
    ("ghm_r", "GHM-R: boxes", "gradient norm of a box coordinate"),
):
    counts, weights, _ = recent_histogram(history, key)
    show(harmonizing_panel(counts, weights, title, norm))

# %% [markdown]
# A harmonized loss hardly falls: its weights keep all bins equal, however good the network gets.
# Learning shows in the plain cross-entropy and the plain box error, which are logged as well. The
# cross-entropy starts low, because a new network predicts background everywhere, and rises before
# it falls.

# %%
show(loss_curves(history))

# %% [markdown]
# ## Evaluate
#
# The twelve COCO metrics on the validation scenes.

# %%
from ghm_jax.evaluate import evaluate
from ghm_jax.runs.metrics import METRICS

metrics = evaluate(run.path, progress=Bar()).metrics
rows = [
    f"| {name} | {f'{100 * metrics[name]:.1f}' if metrics[name] >= 0 else '-'} | {meaning} |"
    for name, meaning in METRICS.items()
]
display(Markdown("\n".join(["| metric | percent | |", "| :-- | --: | :-- |", *rows])))

# %% [markdown]
# ## Detections
#
# Left: the ground truth. Right: the detections.

# %%
import json

from ghm_jax.data import coco_ground_truth
from ghm_jax.evaluation.samples import make_samples
from ghm_jax.plots import sample_grid

validation = open_dataset(config.data, config.data.validation_split)
detections = json.loads(run.detections.read_text())
samples = make_samples(validation, coco_ground_truth(validation), detections, 4)
show(sample_grid(samples, validation.class_names))

# %% [markdown]
# ## Where to go next
#
# * `runs/notebook/report.html` has all of this on one page, and `runs/notebook/tensorboard` the
#   curves: `tensorboard --logdir runs`.
# * See what the floor does: `replace(config, loss=replace(config.loss, ghm_c=without))` with
#   `without = replace(config.loss.ghm_c, min_count=0)` is the published loss, and
#   `classification="focal"` the focal loss. Give each run its own directory.
# * The losses are plain functions for any training loop in JAX:
#   `from ghm_jax.losses import ghm_c_loss, ghm_r_loss`.
# * `03_your_own_data_and_loop`: your own images, and the losses in your own loop.

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
# # Published weights, several devices, pods
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# Detectors of mmdetection and torchvision become runs of this package: described, imported,
# evaluated, drawn. Then one training script gives the same numbers on one, two, four and eight
# devices and in two processes; the same command runs on a TPU pod or with SLURM. Takes a few
# minutes on a CPU.
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
# ## What is published
#
# | file | experiment | published AP |
# | :-- | :-- | --: |
# | mmdetection's `retinanet_ghm_r50_fpn_1x_coco_20200130-a437fda3.pth` | `coco_r50_ghm.py` | 37.0 |
# | torchvision's `retinanet_resnet50_fpn_coco-eeacb38b.pth` | `coco_r50_torchvision.py` | 36.4 |
# | torchvision's `retinanet_resnet50_fpn_v2_coco-5905b1c5.pth` | `…torchvision_v2.py` | 41.5 |
#
# An experiment file defines the network, so that it can be described without any weights. This is
# `ghm-jax describe experiments/coco_r50_ghm.py`; published are 37.74 M trained parameters and
# 239.3 G multiply-adds.

# %%
import io
import json
import os
import tempfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageDraw
import safetensors.numpy
from flax import traverse_util
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from ghm_jax.analysis.cost import describe
from ghm_jax.cli.tables import description_table
from ghm_jax.distributed.devices import use_cpu_cores
from ghm_jax.exceptions import ConfigError
from ghm_jax.models.weight_names import MMDETECTION
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.training.build import make_model

SMOKE = bool(os.environ.get("GHM_NOTEBOOK_SMOKE"))  # the tests run the same cells, in seconds
work = Path(tempfile.mkdtemp())
use_cpu_cores((4,))  # before JAX computes anything: a CPU is one device, unless asked for more

published = load_experiment(root / "experiments/coco_r50_ghm.py")
# The file holds the backbone as well; in float32 the outputs are those of PyTorch.
model = replace(published.model, weights="", dtype="float32")
if SMOKE:
    model = replace(model, backbone="resnet10", width=8, channels=16)
published = replace(published, model=model)
print(description_table(describe(published, num_classes=80, padded_size=(800, 1280))))

# %% [markdown]
# ## Import
#
# With internet access, download a file and set `WEIGHTS` to its name; a `.pth` needs torch, which
# Colab has, and is read without running code that it may contain.
#
# ```
# wget https://download.openmmlab.com/mmdetection/v2.0/ghm/retinanet_ghm_r50_fpn_1x_coco/retinanet_ghm_r50_fpn_1x_coco_20200130-a437fda3.pth
# wget https://download.pytorch.org/models/retinanet_resnet50_fpn_coco-eeacb38b.pth
# ```
#
# `WEIGHTS` may also be `hf://OWNER/NAME/FILE.safetensors`, a file on the Hugging Face Hub (that
# needs `pip install huggingface_hub`).
#
# If it is empty, the next cell makes a stand-in: all names and shapes of the published GHM
# detector, with random numbers. **The stored outputs are those of the stand-in**: every step works,
# but it detects nothing.

# %%
WEIGHTS = ""  # a file of the network in `published`, which is coco_r50_ghm.py above
PHOTOS = []  # your image files


def write_stand_in(path: Path) -> dict[str, np.ndarray]:
    """Random tensors with the names and shapes of mmdetection's GHM RetinaNet."""
    rng = np.random.default_rng(0)
    init = make_model(published, num_classes=80).init
    ours = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    tensors = {}
    for name, leaf in traverse_util.flatten_dict(ours).items():
        # PyTorch has kernels as out x in x height x width.
        shape = [leaf.shape[i] for i in ((3, 2, 0, 1) if leaf.ndim == 4 else range(leaf.ndim))]
        normal = name[-1] in ("scale", "var")
        value = np.ones(shape) if normal else 0.01 * rng.standard_normal(shape)
        tensors[MMDETECTION.tensor(name[1:])] = value.astype(np.float32)
    tensors["bbox_head.retina_cls.bias"] -= 4.6  # as in a new network: all scores about 0.01
    tensors["bbox_head.loss_cls.acc_sum"] = np.zeros(30, np.float32)  # not imported
    safetensors.numpy.save_file(tensors, path)
    return tensors


weights = Path(WEIGHTS or work / "retinanet_ghm_r50_stand_in.safetensors")
if not WEIGHTS:
    tensors = write_stand_in(weights)
    print(f"{len(tensors)} tensors, {weights.stat().st_size / 2**20:.0f} MiB, for example")
    for name in (
        *("backbone.conv1.weight", "backbone.layer1.0.bn1.running_mean"),
        *("neck.lateral_convs.0.conv.weight", "bbox_head.retina_cls.weight"),
    ):
        print(f"  {name:<36}{list(tensors[name].shape)}")

# %% [markdown]
# `import_run` is `ghm-jax import WEIGHTS EXPERIMENT`. It is strict: the tensors of the file and the
# parameters of the network must match one to one. With the experiment of another network it reports
# what does not match in one line, and writes nothing. COCO's classes are known; the COCO data is
# not needed yet.

# %%
from ghm_jax.import_weights import import_run

run = import_run(str(weights), published, work / "published")
print("imported:", sorted(path.name for path in run.path.iterdir()))

other = replace(published, model=replace(model, backbone="resnet18" if SMOKE else "resnet101"))
try:
    import_run(str(weights), other, work / "other")
except ConfigError as error:
    print(str(error).replace(f"{work}/", ""))

# %% [markdown]
# ## Predict and evaluate
#
# `ghm-jax predict RUN IMAGES --out DIR` on your photographs. Without any, on a grey image, in which
# the stand-in detects nothing, as it should: no score comes near the threshold of 0.3.

# %%
from ghm_jax.predict import predict


def show(picture: Figure | Path) -> None:
    """Displays a figure, or an image from a file."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=110)
    else:
        image = PIL.Image.open(picture).convert("RGB")
        image.thumbnail((1000, 1000))
        image.save(buffer, format="jpeg", quality=80)
    display(Image(buffer.getvalue()))


photos = [str(photo) for photo in PHOTOS]
if not photos:
    photos = [str(work / "grey.png")]
    PIL.Image.new("RGB", (96, 64) if SMOKE else (1280, 800), "grey").save(photos[0])
found = predict(run.path, photos, work / "photos")
print(f"{found.detections} detections on {found.images} image(s)")
if PHOTOS:
    show(work / "photos/contact_sheet.jpg")

# %% [markdown]
# The published result is 37.0 AP on COCO's 5,000 validation images. It has not been measured with
# this package yet. With COCO on disk these commands measure it (a GPU or TPU takes minutes, a CPU
# most of a day; `--subset 2%` gives a first impression):
#
# ```
# ghm-jax data prepare coco/2017 --source DIR_OF_UNPACKED_OFFICIAL_FILES --out data \
#     --splits validation
# ghm-jax import retinanet_ghm_r50_fpn_1x_coco_20200130-a437fda3.pth \
#     experiments/coco_r50_ghm.py --data.dir data --model.dtype float32
# ghm-jax evaluate runs/retinanet_ghm_r50_fpn_1x_coco_20200130-a437fda3
# ```
#
# Add `--data.annotations instances_val2017.json` to `import` for scores against the official file,
# as published ones are. `ghm-jax train` with the same run directory trains such a run further.
#
# ## The same steps with trained weights
#
# A small detector of squares and discs, trained here in a minute. `export` writes its weights in
# torchvision's names, and `import_run` makes a new run of that file: torchvision's published files
# are imported in the same way.

# %%
from ghm_jax.data import prepare_folder
from ghm_jax.evaluate import evaluate
from ghm_jax.export import export
from ghm_jax.train import train

SIDE = 64 if SMOKE else 128


def draw_split(split: str, count: int, seed: int) -> tuple[Path, Path]:
    """Writes images and their annotations in COCO's format; returns both paths."""
    rng = np.random.default_rng(seed)
    folder = work / split
    folder.mkdir()
    images, annotations = [], []
    for i in range(count):
        noise = rng.integers(60, 140, (SIDE, SIDE, 3)).astype(np.uint8)
        picture = PIL.Image.fromarray(noise)
        pen = PIL.ImageDraw.Draw(picture)
        for x in (0, SIDE // 2):  # one object in each half
            kind, size = int(rng.integers(2)), int(rng.integers(SIDE // 6, SIDE // 3))
            x0, y0 = x + int(rng.integers(SIDE // 2 - size)), int(rng.integers(SIDE - size))
            shape = pen.ellipse if kind else pen.rectangle
            color = tuple(int(c) for c in rng.integers(150, 256, 3))
            shape((x0, y0, x0 + size - 1, y0 + size - 1), fill=color)
            box = {"bbox": [x0, y0, size, size], "area": size * size, "iscrowd": 0}
            number = len(annotations) + 1
            annotations.append({"id": number, "image_id": i, "category_id": 1 + kind, **box})
        picture.save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
    path = work / f"{split}.json"
    tables = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(tables))
    return folder, path


train_images = draw_split("train", 16 if SMOKE else 240, seed=0)
validation_images = draw_split("validation", 8 if SMOKE else 60, seed=1)
splits = {"train": train_images, "validation": validation_images}
prepare_folder("shapes", work / "data", splits)

small = load_experiment(root / "experiments/quickstart.py")
data = {"name": "shapes", "dir": str(work / "data"), "flip": 0.5}
data |= {"short_side": SIDE, "long_side": SIDE, "buckets": ((SIDE, SIDE),)}
small = replace(
    small,
    data=replace(small.data, **data),
    # Only batch normalization can be exported: torchvision's ResNets have it.
    model=replace(small.model, norm="batch", **({"width": 8, "channels": 8} if SMOKE else {})),
    anchors=replace(small.anchors, scale=2.5, ratios=(1.0,)),  # as high as wide, 20 to 43 pixels
    optimizer=replace(small.optimizer, steps=4 if SMOKE else 400, warmup_steps=2 if SMOKE else 50),
    predict=replace(small.predict, batch_size=8, candidates=100),
)
train(small, work / "trained")
before = evaluate(work / "trained").metrics

(file,) = export(work / "trained", work / "shapes.safetensors")
names = safetensors.numpy.load_file(file)
print(f"{len(names)} tensors, such as {', '.join(sorted(names)[:2])}")

frozen = replace(small, model=replace(small.model, norm="frozen"))  # its statistics are fixed now
import_run(str(file), frozen, work / "imported")
after = evaluate(work / "imported").metrics
for key in ("AP", "AP50", "AR100"):
    print(f"{key:<6} trained {before[key]:.4f}   exported and imported {after[key]:.4f}")

# %%
pictures = [str(validation_images[0] / f"{i}.png") for i in range(8)]
found = predict(work / "imported", pictures, work / "found")
print(f"{found.detections} detections on {found.images} images")
show(work / "found/contact_sheet.jpg")

# %% [markdown]
# `found/predictions.json` holds them as COCO JSON, and each image is drawn in the same folder.
#
# ## Multiple devices
#
# A step is written for one device, with explicit sums over all of them: of the gradients, and of
# the two histograms. So the loss is that of the whole batch however it is split. This cannot be
# taken for granted: in the published code every GPU counts its own images. Here is the effect on
# one batch of the detector above (at half the contrast, so that it is not too easy), split over
# eight devices with one image each: grey for the weights by eight separate histograms, blue for
# those by the histogram of all. Empty bins are not drawn.

# %%
from ghm_jax.data import open_dataset, train_batches
from ghm_jax.detection.outputs import loss_inputs
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.losses import LossStats, ghm_c_loss
from ghm_jax.plots.figures import BLUE, GREEN, GREY, ORANGE, style
from ghm_jax.runs.directory import RunDirectory, load_run

eight = replace(small, optimizer=replace(small.optimizer, batch_size=8))
shapes = open_dataset(eight.data, "train")
batches = train_batches(shapes, eight, start_step=0)
batch = next(batches).batch
batches.close()
imported, config = load_run(work / "imported")
variables = restore_state(imported, config, jax.devices()[0]).variables
batch = batch._replace(images=batch.images // 2 + 64)
model = make_model(config, num_classes=2)
logits, _, targets = loss_inputs(variables, batch, config=config, model=model)


def drawn(stats: LossStats) -> np.ndarray:
    """Weights by bin; NaN for empty bins."""
    return np.where(np.asarray(stats.counts) > 0, stats.weights, np.nan)


def whole(x: jax.Array) -> tuple[jax.Array, list[LossStats]]:
    """Loss and statistics with one histogram."""
    loss, _, stats = ghm_c_loss(x, targets.classes, min_count=0)
    return loss, [stats]


def apart(x: jax.Array) -> tuple[jax.Array, list[LossStats]]:
    """The same with a histogram for each image: the mean loss."""
    results = [ghm_c_loss(x[i], targets.classes[i], min_count=0) for i in range(8)]
    return sum(loss for loss, _, _ in results) / 8, [stats for _, _, stats in results]


figure = Figure(figsize=(8, 3.2), layout="constrained")
ax = figure.subplots()
gradients = []
for loss, label, color, width in (
    (apart, "each device its own", GREY, 1.0),
    (whole, "of all devices", BLUE, 2.2),
):
    (_, all_stats), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    gradients.append(np.asarray(gradient, np.float64))
    for i, stats in enumerate(all_stats):
        edges = np.linspace(0, 1, len(stats.counts) + 1)
        once = label if i == 0 else None
        ax.stairs(drawn(stats), edges, baseline=None, color=color, lw=width, label=once)
style(ax, "Weight of an example", "weight")
ax.set_yscale("log")
ax.set_xlabel("gradient norm")
ax.legend(frameon=False)
show(figure)
away = np.linalg.norm(gradients[0] - gradients[1]) / np.linalg.norm(gradients[1])
print(f"difference of the gradients: {away:.0%}")

# %% [markdown]
# Now the same training on one, two, four and eight devices, and as two processes with four each,
# as on two hosts. They are separate processes on this machine's CPU, which JAX can present as any
# number of devices; with GPUs or TPUs omit `JAX_PLATFORMS` and `JAX_NUM_CPU_DEVICES`. All use one
# script with one config: only `--run.devices` and the addresses of the processes differ.

# %%
import socket

tiny = replace(
    eight,
    model=replace(eight.model, norm="group", width=8, channels=16),
    optimizer=replace(
        eight.optimizer,
        name="sgd",
        learning_rate=0.002,
        steps=4 if SMOKE else 16,
        warmup_steps=0,
    ),
    run=replace(eight.run, log_every=1),
)
script = work / "shapes.py"
script.write_text(f"from ghm_jax.config import *\n\nconfig = {tiny!r}\n")


def start(name: str, devices: int, *options: str) -> subprocess.Popen:
    """`ghm-jax train shapes.py` in its own process with that many CPU devices."""
    command = [sys.executable, "-c", "from ghm_jax.cli import main; main()"]
    command += ["train", str(script), "--run-dir", str(work / name), *options]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    print(next((line.rpartition("/")[2] for line in said.splitlines() if " steps on " in line), ""))


counts = (1, 8) if SMOKE else (1, 2, 4, 8)
for count in counts:
    finish(start(f"devices{count}", 8, "--run.devices", str(count)))

with socket.socket() as listener:  # finds a free port
    listener.bind(("localhost", 0))
    port = listener.getsockname()[1]
job = ("--distributed.coordinator", f"localhost:{port}", "--distributed.num-processes", "2")
processes = [start("job", 4, *job, "--distributed.process-id", str(i)) for i in range(2)]
for process in processes:
    finish(process)

# %% [markdown]
# Left: the plain cross-entropy of all these runs, a single curve. Right: their difference from the
# run on one device, because float32 sums depend on the order. Rounding may also move an example
# across the edge of a bin, and if that bin holds a handful of examples, the weights jump a little:
# as with two devices at step 8 of the stored outputs, where one of 10,700 scores fell into another
# bin. Such a jump comes sooner with a larger learning rate or a smaller batch.

# %%
trainings = {f"devices{n}": f"{n} device{'s' * (n > 1)}" for n in counts}
trainings["job"] = "2 processes of 4"


def read(name: str, key: str) -> np.ndarray:
    lines = RunDirectory(work / name).history.read_text().splitlines()
    return np.array([json.loads(line)[key] for line in lines])


figure = Figure(figsize=(9, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
alone = read("devices1", "cross_entropy")
colors = ("black", GREY, GREEN, BLUE, ORANGE)
rows = ["| training | last loss | last cross-entropy |", "| :-- | --: | --: |"]
for (name, label), color, width in zip(trainings.items(), colors, (5, 4, 3, 2, 1), strict=False):
    curve = read(name, "cross_entropy")
    step = np.arange(1, len(curve) + 1)
    left.plot(step, curve, color=color, lw=width, label=label)
    if name != "devices1":
        difference = np.maximum(np.abs(curve - alone) / alone, 1e-9)
        right.plot(step, difference, color=color, lw=1.5, label=label)
    loss = read(name, "loss")[-1]
    rows.append(f"| {label} | {loss:.6f} | {curve[-1]:.6f} |")
style(left, "Cross-entropy", "cross-entropy")
left.set_ylim(bottom=0)
style(right, "Relative difference from one device", "difference")
right.set_yscale("log")
right.set_ylim(1e-9, 1e-3)
for ax in (left, right):
    ax.set_xlabel("step")
    ax.legend(frameon=False)
show(figure)
display(Markdown("\n".join(rows)))

# %% [markdown]
# ## TPU pods and SLURM
#
# A pod or a cluster runs the same command once per process, and `--distributed.detect` lets them
# find each other. All see the same directories (a network file system) or the same bucket, and
# batch sizes must be multiples of the number of all devices. These commands follow JAX's
# documentation; **no pod and no cluster was available to run them**. What was run is above: two
# processes on one machine; and in the project's tests, two processes that share only an emulated
# bucket.
#
# A TPU pod, whose workers share a bucket; each copies the data that it needs from there. On one TPU
# host or on Colab's TPU, plain `ghm-jax train` uses all chips:
#
# ```
# gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd ghm_jax && \
#     .venv/bin/ghm-jax train experiments/coco_r50_ghm.py --data.dir gs://BUCKET/data \
#     --run-dir gs://BUCKET/runs/coco --distributed.detect"
# ```
#
# SLURM, two nodes of eight GPUs:
#
# ```
# srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 \
#     ghm-jax train experiments/coco_r50_ghm.py --data.dir data --distributed.detect
# ```
#
# If the machines are preempted, the same command resumes from the last checkpoint. With more
# devices raise `optimizer.batch_size` and with it `optimizer.learning_rate`;
# `experiments/coco_r50_schedules.py` has such recipes.
#
# ## Where to go next
#
# * `docs/multi_host.md`: multiple hosts in detail: addresses, SLURM, Open MPI, pods and their cost.
# * `docs/buckets.md`: runs and data in a bucket.
# * `docs/recipes.md`: all commands from data to detections.
# * `tests/test_parity_torchvision.py`: the test that torchvision's models give the same numbers
#   here, from the image to the detections.

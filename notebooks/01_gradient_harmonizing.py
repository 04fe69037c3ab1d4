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
# # Gradient harmonizing
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# The idea of *Gradient Harmonized Single-stage Detector* (Li, Liu, Wang, AAAI 2019) in figures:
# what a gradient norm is, how its density becomes a weight, how GHM-C differs from cross-entropy
# and focal loss, what the histogram and its moving average do, and what the density floor of this
# package is for. Takes a minute on a CPU.
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
# ## What is imbalanced
#
# A dense detector scores every anchor for every class: few positives, an overwhelming background.
# For a probability $p = \sigma(x)$ and a target $p^* \in \{0, 1\}$ the cross-entropy has the
# gradient $\partial L / \partial x = p - p^*$, so the **gradient norm** $g = |p - p^*|$ says how
# wrong an example is: 0 is correct and certain, 1 is entirely wrong.
#
# Here are logits like those of a half-trained detector: 200,000 easy background examples, 4,000
# undecided ones, 1,000 positives, and 300 whose label the network will never agree with.

# %%
import functools
import io
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Image, display
from matplotlib.figure import Figure

from ghm_jax import losses
from ghm_jax.losses import REFERENCE, ghm_c_loss, harmonize, init_ghm_state
from ghm_jax.plots import (
    gradient_norm_distribution,
    gradient_shares,
    gradient_totals,
    harmonizing_panel,
)
from ghm_jax.plots.figures import BLUE, GREY, ORANGE, style

SMOKE = bool(os.environ.get("GHM_NOTEBOOK_SMOKE"))  # the tests run the same cells, in seconds
rng = np.random.default_rng(0)


def show(figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    display(Image(buffer.getvalue()))


kinds = {"easy": (200_000, -6, 1.5, 0), "undecided": (4_000, -1, 1.5, 0)}
kinds |= {"positive": (1_000, 1, 2, 1), "hopeless": (300, -6, 1, 1)}
logits = jnp.concatenate([rng.normal(m, s, n) for n, m, s, _ in kinds.values()])
logits = logits[:, None].astype(jnp.float32)  # [examples, 1 class]
targets = jnp.concatenate([jnp.full((n, 1), float(t)) for n, _, _, t in kinds.values()])
norm = jnp.abs(jax.nn.sigmoid(logits) - targets)

weights, _, stats = harmonize(norm, bins=30, min_count=0)
show(gradient_norm_distribution(stats.counts, "Gradient norms", "gradient norm g = |p - p*|"))

# %% [markdown]
# The axis is logarithmic: the first bin holds nearly everything. Note the rise at the right end,
# the hopeless examples. The gradient of each is hundreds of times that of an easy example.
#
# ## Density becomes weight
#
# GHM counts how many examples have about the same norm, the **gradient density** $GD(g)$, and
# gives each example the weight $\beta = N / GD(g)$. Every range of norms then has the same total
# weight: examples that are abundant, easy *or* hopeless, count less. The loss is
#
# $$L_{GHM\text{-}C} = \frac{1}{N} \sum_i \beta_i \, L_{CE}(p_i, p_i^*)$$
#
# Grey is the share of the examples in each bin, blue the share of the weight, orange the weight
# of one example.

# %%
show(harmonizing_panel(stats.counts, stats.weights, "GHM-C, 30 bins", "gradient norm"))

# %% [markdown]
# ## Cross-entropy, focal loss, GHM-C
#
# Where does the gradient of a batch come from? Each line is the sum of the gradients of the
# examples in a bin as a share of the total, computed by `jax.grad` from the loss itself. Under
# cross-entropy the easy background and the hopeless examples dominate. Focal loss reduces the easy
# ones and leaves the hopeless ones with the largest share. GHM-C reduces both.

# %%
compared = {
    "cross-entropy": losses.cross_entropy_loss,
    "focal loss": losses.focal_loss,
    "GHM-C": functools.partial(ghm_c_loss, min_count=0),
}
totals = {name: gradient_totals(loss, logits, targets, 30) for name, loss in compared.items()}
show(gradient_shares(totals))
for name, total in totals.items():
    share = np.asarray(total) / np.sum(total)
    print(f"{name:<14} g < 1/30: {share[0]:6.1%}     g > 29/30: {share[-1]:6.1%}")

# %% [markdown]
# ## Real logits
#
# The same with a network that learns: windows over scans of handwritten digits. One in fifty has a
# digit at its center, which is the positive class; the others hold nothing or a digit that is cut
# off. 2 % of the labels are wrong on purpose. A small network is trained with cross-entropy; the
# figure shows its gradient norms at the start, early and late.

# %%
from sklearn.datasets import load_digits

scans = load_digits().images / 16.0  # [1797, 8, 8]


def make_windows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows f32[count, 64] with noise, and whether a whole digit is in the middle [count, 1]."""
    found = rng.random(count) < 0.02
    image = np.pad(scans[rng.integers(len(scans), size=count)], ((0, 0), (8, 8), (8, 8)))
    away = rng.choice([-7, -6, -5, -4, 4, 5, 6, 7], (count, 2)) * ~found[:, None]
    away[rng.random(count) < 0.5] = [8, 8]  # nothing in sight
    away[found] = 0
    rows = 8 + away[:, :1, None] + np.arange(8)[:, None]
    columns = 8 + away[:, 1:, None] + np.arange(8)
    windows = image[np.arange(count)[:, None, None], rows, columns]
    windows += rng.normal(0, 0.4, windows.shape)
    wrong = rng.random(count) < 0.02
    return windows.reshape(count, 64).astype(np.float32), (found ^ wrong)[:, None].astype(float)


windows, labels = (jnp.asarray(a, jnp.float32) for a in make_windows(5_000 if SMOKE else 50_000))
key1, key2 = jax.random.split(jax.random.key(0))
params = {
    "hidden": jax.random.normal(key1, (64, 32)) / 8,
    "out": jax.random.normal(key2, (32, 1)) / 6,
    "bias": jnp.full((1, 1), -2.0),
}


def network(params, windows):
    return jnp.tanh(windows @ params["hidden"]) @ params["out"] + params["bias"]


@jax.jit
def step(params):
    def loss(params):
        return losses.cross_entropy_loss(network(params, windows), labels)[0]

    return jax.tree.map(lambda p, g: p - 1.0 * g, params, jax.grad(loss)(params))


seen = {}
for i in range(21 if SMOKE else 401):
    if i in (0, 20, 400):
        seen[i] = ghm_c_loss(network(params, windows), labels, min_count=0)
    params = step(params)

figure = Figure(figsize=(8, 3.2), layout="constrained")
ax = figure.subplots()
edges = np.linspace(0, 1, 31)
for (i, (_, _, stats)), color in zip(seen.items(), (GREY, ORANGE, BLUE), strict=False):
    share = np.asarray(stats.counts) / float(stats.num_valid)
    drawn = np.where(share > 0, share, np.nan)
    label = f"step {i}: cross-entropy {stats.plain_loss:.3f}"
    ax.stairs(drawn, edges, baseline=None, color=color, lw=1.8, label=label)
style(ax, "Gradient norms while the network learns", "share of the examples")
ax.set_yscale("log")
ax.set_xlabel("gradient norm")
ax.legend(frameon=False)
show(figure)

# %% [markdown]
# The wrong labels end up at the right: the network has learned that they are wrong, and under
# cross-entropy they now make up most of the gradient. GHM reduces their weight, focal loss does
# not.
#
# ## Bins, and the exact density
#
# The density in a window around each example costs a sort (`density="exact"`, equations 4 to 6 of
# the paper). Training uses counts in fixed bins. The lines are the weights for bins of different
# widths; the exact density has a window of 1/30.

# %%
real = network(params, windows)
real_norm = jnp.abs(jax.nn.sigmoid(real) - labels)
order = np.argsort(np.asarray(real_norm[:, 0]))

figure = Figure(figsize=(8, 3.4), layout="constrained")
ax = figure.subplots()
ways = {f"{bins} bins": {"bins": bins} for bins in (5, 30, 200)}
ways["exact, window 1/30"] = {"bins": 30, "density": "exact"}
for (name, how), color in zip(ways.items(), (GREY, BLUE, ORANGE, "black"), strict=True):
    weigh = jax.jit(functools.partial(harmonize, min_count=0, **how))
    jax.block_until_ready(weigh(real_norm))  # compiles
    spent = []
    for _ in range(9):
        start = time.perf_counter()
        weights = jax.block_until_ready(weigh(real_norm))[0]
        spent.append(1e3 * (time.perf_counter() - start))
    x, y = np.asarray(real_norm)[order, 0], np.asarray(weights)[order, 0]
    ax.plot(x, y, color=color, lw=1, label=f"{name}: {np.median(spent):.1f} ms")
style(ax, "Weight of an example", "weight")
ax.set_yscale("log")
ax.set_xlabel("gradient norm")
ax.legend(frameon=False, ncols=2)
show(figure)

# %% [markdown]
# With few bins the weights are coarse; with many, single examples become visible. The published
# number is 30.
#
# ## The moving average
#
# A batch is a sample: its histogram varies from step to step. GHM keeps a moving average $S_t =
# \alpha S_{t-1} + (1 - \alpha) R_t$, and it is *explicit state*: passed in and returned. Left:
# the weight of the last bin over steps with 500 examples each. Right: the first steps; the
# published code starts its average at zero, so that the first weights are too large by a factor of
# $1 / (1 - \alpha)$.

# %%
steps = 60
figure = Figure(figsize=(9, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)


def weights_over_steps(**how) -> list[float]:
    """Weight of the last bin."""
    draw = np.random.default_rng(1)
    state = init_ghm_state(bins=10)
    update = jax.jit(functools.partial(harmonize, **how))
    last = []
    for _ in range(steps):
        batch = real_norm[draw.choice(len(real_norm), 500)]
        _, state, stats = update(batch, state=state)
        last.append(float(stats.weights[-1]))
    return last


for momentum, color in ((0.0, GREY), (0.75, BLUE), (0.95, ORANGE)):
    curve = weights_over_steps(momentum=momentum, min_count=0)
    left.plot(curve, color=color, lw=1.6, label=f"momentum {momentum}")
for name, how, color in (
    ("bias-corrected", {"min_count": 0}, BLUE),
    ("published code", dict(REFERENCE), ORANGE),
):
    curve = weights_over_steps(momentum=0.9, **how)
    right.plot(curve[:30], color=color, lw=1.6, label=name)
for ax, title in (
    (left, "Weight of the last bin"),
    (right, "The same, momentum 0.9, at the start"),
):
    style(ax, title, "weight")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
    ax.legend(frameon=False)
show(figure)

# %% [markdown]
# ## The density floor
#
# If a bin holds three examples, dividing by their density gives these three as much weight as
# another bin gives to thousands, and in the next batch they are a different three. On small data
# this ruins training. `min_count` treats a bin with fewer examples as if it had that many: a bound
# on every weight. `min_count=0` is the published loss.
#
# A batch of 2,000 of the examples above, with three floors:

# %%
small = real_norm[:2_000]
figure = Figure(figsize=(8, 3.2), layout="constrained")
ax = figure.subplots()
for floor, color in ((0, GREY), (10, BLUE), (100, ORANGE)):
    stats = harmonize(small, bins=30, min_count=floor)[2]
    filled = np.asarray(stats.counts) > 0
    drawn = np.where(filled, stats.weights, np.nan)
    ax.stairs(drawn, edges, baseline=None, color=color, lw=1.8, label=f"min_count={floor}")
style(ax, "Weight of an example in a batch of 2,000", "weight")
ax.set_yscale("log")
ax.set_xlabel("gradient norm")
ax.legend(frameon=False)
show(figure)

# %% [markdown]
# Move the sliders: how many bins, how high the floor, and how strongly to harmonize (`strength`, 0
# is cross-entropy). They need a running notebook with `ipywidgets`, which Colab has; a stored
# notebook, or one without `ipywidgets`, shows the figure for one setting.

# %%
late = {"continuous_update": False}  # draws when a slider is released


def draw(bins: int = 30, min_count: float = 10.0, strength: float = 1.0) -> None:
    stats = harmonize(small, bins=bins, min_count=min_count, strength=strength)[2]
    title = f"{bins} bins, floor {min_count:g}, strength {strength:g}"
    show(harmonizing_panel(stats.counts, stats.weights, title, "gradient norm"))


if importlib.util.find_spec("ipywidgets"):
    from ipywidgets import FloatSlider, IntSlider, interact

    interact(
        draw,
        bins=IntSlider(30, 2, 100, **late),
        min_count=IntSlider(10, 0, 200, 5, **late),
        strength=FloatSlider(value=1.0, min=0.0, max=1.0, step=0.05, **late),
    )
else:
    draw()

# %% [markdown]
# ## The loss value stays near 1
#
# The most frequent report: "the loss does not fall". It cannot. Cross-entropy is $-\ln(1 - g)$; if
# every bin has the same weight, its mean over the bins is about $\int_0^1 -\ln(1 - g)\,dg = 1$,
# however good the network is. Watch `stats.plain_loss`.

# %%
for i, (value, _, stats) in seen.items():
    print(f"step {i:<6} GHM-C {value:.3f}     plain cross-entropy {stats.plain_loss:.3f}")

# %% [markdown]
# ## Boxes: GHM-R
#
# Smooth L1 has the gradient $\pm 1$ for every error above 1/9: outliers cannot be distinguished.
# ASL1, $\sqrt{d^2 + \mu^2} - \mu$, has the same shape but a gradient norm
# $|d| / \sqrt{d^2 + \mu^2}$ that is below 1 and preserves their order, so its density can be
# counted. GHM-R is ASL1, harmonized.

# %%
error = jnp.asarray(np.concatenate([rng.normal(0, 0.03, 4_000), rng.normal(0, 0.6, 400)]))
error = error[:, None].astype(jnp.float32)
_, _, stats = losses.ghm_r_loss(error, jnp.zeros_like(error), bins=10)
show(harmonizing_panel(stats.counts, stats.weights, "GHM-R, 10 bins", "gradient norm of ASL1"))

# %% [markdown]
# ## Where to go next
#
# * `02_train_a_detector`: the losses in a detector.
# * `03_your_own_data_and_loop`: your images, and the losses in your own loop.
# * `docs/losses.md`: all formulas and settings.

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
# # What GHM does
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# The paper's claims, tried on scenes of handwritten digits: which classification loss gives the
# best detector, how much tuning each needs, how well its scores are calibrated, and what wrong
# labels do. All losses are tuned alike, and every setting that was chosen is trained with three
# fresh seeds. Nothing is trained here: the cells read the results of `python -m experiments.study`
# (`docs/study.md` has the rules) and draw what is finished, in a few seconds.
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
# ## The results
#
# One line of JSON for each run: its figures, the command, the date and the machine.

# %%
import io
import json
import math
import os
import statistics
import sys

from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from ghm_jax.plots.figures import BLUE, GREEN, GREY, ORANGE, legend, style

SMOKE = bool(os.environ.get("GHM_NOTEBOOK_SMOKE"))
sys.path.insert(0, str(root))

from experiments.study import plan, summary

results = summary.read_results(root / "experiments/results/study/runs.jsonl")
questions = {question.key: question for question in plan.QUESTIONS}
COLORS = (BLUE, ORANGE, GREEN, GREY, "#8250df", "#bf3989", "#9a6700", "#116329", "#0a3069")


def finished(key: str) -> list[summary.Row]:
    """The losses of a question whose runs are all finished."""
    return summary.rows(questions[key], results)


def show(figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    display(Image(buffer.getvalue()))


hours = sum(run["seconds"] for run in results.values()) / 3600
print(f"{len(results)} runs, {hours:.1f} hours of one core")
for key, question in questions.items():
    wanted = len(question.entries) * len(question.data)
    print(f"{key:<4}{len(finished(key)):>3} of {wanted:>2} rows  {question.title}")

# %% [markdown]
# ## Which classification loss?
#
# Table 4 of the paper asks it on COCO. A dot is a seed, a line the mean. The differences in the
# table are to focal loss, seed by seed: if their range holds both signs, three seeds do not tell
# the two losses apart.


# %%
def draw_scores(rows: list[summary.Row], title: str) -> None:
    """AP of every seed, a line for each loss."""
    figure = Figure(figsize=(6, 0.6 + 0.3 * len(rows)))
    ax = figure.add_subplot()
    for place, row in enumerate(reversed(rows)):
        ax.plot(row.ap, [place] * len(row.ap), "o", color=BLUE, alpha=0.7, markersize=5)
        mean = statistics.mean(row.ap)
        ax.plot([mean, mean], [place - 0.3, place + 0.3], color=ORANGE, lw=2)
    ax.set_yticks(range(len(rows)), [row.entry.name for row in reversed(rows)])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    style(ax, title, "")
    show(figure)


def compare(key: str) -> None:
    """Figure and table of a question."""
    rows = finished(key)
    if not rows:
        print(f"{key} is not finished")
        return
    for data in dict.fromkeys(row.data for row in rows):
        draw_scores([row for row in rows if row.data == data], f"AP on {data}, validation split")
    display(Markdown(summary.scores_table(rows)))


compare("H1")

# %% [markdown]
# Twice as many steps, as the quickstart has, without tuning; and AP by IoU. With a large share of
# the gradient the classes get better and the boxes less exact.

# %%
display(Markdown(summary.scores_table(finished("H12"))))
display(Markdown(summary.iou_table(finished("H12"))))

# %% [markdown]
# ## Without laborious tuning?
#
# The paper says that GHM needs no laborious tuning. Here is the AP of the tuning runs of the first
# losses, by the weight of the loss (solid, at the base learning rate) and by the learning rate
# (dashed, at the base weight), as multiples of the base value. What counts is how flat a curve is,
# and that the best value is not at its end.


# %%
def draw_tuning(key: str, most: int = 4) -> None:
    """AP of the tuning runs of a question's first losses."""
    figure = Figure(figsize=(6, 3))
    ax = figure.add_subplot()
    question = questions[key]
    for entry, color in zip(question.entries[:most], COLORS, strict=False):
        trials, best = summary.tune(question, entry, results)
        if best is None:
            continue
        for kind, line, other in (
            ("weight", "-o", "learning_rate"),
            ("learning_rate", "--s", "weight"),
        ):
            points = sorted(
                (math.log2(getattr(trial, kind)), summary.ap_of(results[trial.key]))
                for trial in trials
                if getattr(trial, other) == 1
            )
            if len(points) < 2:
                continue
            name = entry.name if kind == "weight" else None
            ax.plot(*zip(*points, strict=True), line, color=color, label=name, markersize=4)
    low, high = (round(edge) for edge in ax.get_xlim())
    ax.set_xticks(range(low, high + 1), [f"x{2.0**n:g}" for n in range(low, high + 1)])
    ax.set_xlabel("multiple of the base value", fontsize=8.5)
    style(ax, "", "AP, seed 0")
    if ax.lines:
        legend(ax, columns=2)
        show(figure)


draw_tuning("H1")
display(Markdown(summary.tuning_table(questions["H1"], results)))
display(Markdown(summary.sensitivity_table(questions["H1"], results)))

# %% [markdown]
# ## Are the scores what they say?
#
# Of all detections with a score of about 0.7, seven in ten should be right. The dotted diagonal is
# that; below it a detector is too sure. Runs as long as the quickstart's, seeds together, ten bins
# of score; bins of less than 30 detections say nothing.

# %%
figure = Figure(figsize=(4, 4))
ax = figure.add_subplot()
ax.plot([0, 1], [0, 1], ":", color=GREY)
rows = summary.at_base_weight(finished("H12"))
for row, color in zip(rows, COLORS, strict=False):
    bins = summary.pooled_bins(row)
    points = [(score, precision) for score, precision, count in bins if count >= 30]
    ax.plot(*zip(*points, strict=True), "-o", color=color, label=row.entry.name, markersize=4)
ax.set_xlabel("mean score", fontsize=8.5)
style(ax, "", "precision at IoU 0.5")
if rows:
    legend(ax, columns=2)
    show(figure)
    display(Markdown(summary.calibration_table(rows)))

# %% [markdown]
# ## Do wrong labels hurt less?
#
# What sets GHM apart from focal loss is that it also weights down the very hard examples, which
# may be outliers. Here a part of the training labels is wrong, or boxes are missing.


# %%
def draw_outliers(kind: str) -> None:
    """AP by the part of the training labels that is spoilt."""
    rows = [row for row in finished("H5") if row.data == "digit_scenes" or kind in row.data]
    losses = dict.fromkeys(row.entry.name for row in rows)
    if all(row.data == "digit_scenes" for row in rows):
        print(f"H5 is not finished ({kind})")
        return
    figure = Figure(figsize=(6, 3))
    ax = figure.add_subplot()
    for name, color in zip(losses, COLORS, strict=False):
        of_loss = [row for row in rows if row.entry.name == name]
        parts = [int(row.data.rpartition("_")[2]) if kind in row.data else 0 for row in of_loss]
        points = sorted(
            (part, statistics.mean(r.ap)) for part, r in zip(parts, of_loss, strict=True)
        )
        ax.plot(*zip(*points, strict=True), "-o", color=color, label=name, markersize=4)
    ax.set_xlabel(f"{kind.replace('_', ' ')}, percent of the training objects", fontsize=8.5)
    style(ax, "", "AP, mean of the seeds")
    legend(ax, columns=2)
    show(figure)


draw_outliers("wrong_labels")
draw_outliers("missing_boxes")
if finished("H5"):
    display(Markdown(summary.outliers_table(finished("H5"))))

# %% [markdown]
# ## Boxes, changes of GHM-C
#
# Tables 5 and 6 of the paper ask for box losses at higher and higher IoU. Here the weights of GHM-R
# do harm, least of all with a `mu` of 0.1, near the errors that there are. Then the classification
# losses again, with smooth L1; both kinds in twice as many steps, where GHM-R with the larger `mu`
# is a little better than smooth L1; six changes of GHM-C that the density floor and the
# measurements suggest.

# %%
compare("H3")
if finished("H3"):
    display(Markdown(summary.iou_table(finished("H3"))))
for key in ("H13", "H14", "H11"):
    compare(key)

# %% [markdown]
# ## Real images
#
# Blood cells, with about 1,900 positive anchors in a batch of four images, and defects of circuit
# boards, with 140, both with settings that were tuned on the cells. Published GHM-C is good on the
# cells and finds nothing on the boards. Then the boards again, with settings of their own.

# %%
for key in ("H9", "H15"):
    compare(key)

# %% [markdown]
# ## Why does a floor help?
#
# At a fixed state, trained with or without a floor: the noise of the gradient that comes from the
# examples of one bin, over 64 batches (left), and the share of positive examples by score, with
# the share at which the gradients cancel (right, dashed; dotted: a score that is the probability).
# `docs/study.md` has the equations.

# %%
measured = json.loads((root / "experiments/results/study/variance.json").read_text())["rows"]
figure = Figure(figsize=(8, 3.2))
noise, rest = figure.subplots(1, 2)
rest.plot([0, 1], [0, 1], ":", color=GREY)
for row, floor, color in zip(measured, measured[0]["at_rest"], (ORANGE, BLUE), strict=True):
    points = [
        (count, variance)
        for count, variance in zip(row["counts"], row[floor]["variance"], strict=True)
        if count >= 1
    ]
    noise.loglog(*zip(*points, strict=True), "o", color=color, markersize=4, label=floor)
    seen = [
        (score, share, cancel)
        for score, share, cancel in zip(
            row["score"], row["positive"], row["at_rest"][floor], strict=True
        )
        if share > 0
    ]
    score, share, cancel = zip(*seen, strict=True)
    rest.plot(score, share, "-o", color=color, markersize=4, label=floor)
    rest.plot(score, cancel, "--", color=color)
noise.set_xlabel("examples in the bin, of 130,000", fontsize=8.5)
style(noise, "variance of the gradient", "")
rest.set_xlabel("score", fontsize=8.5)
style(rest, "share of positives", "")
for ax in (noise, rest):
    legend(ax)
figure.tight_layout()
show(figure)
display(Markdown(summary.noise_table(measured)))
display(Markdown(summary.rest_table(measured)))

# %% [markdown]
# ## Bins, momentum, replicas
#
# Options of GHM-C, with the weight that was best for it. One seed: small differences say nothing.
# With a floor, 20 bins are as good as 40, a momentum of 0.5 as one of 0.9, and histograms of single
# images as one of the whole batch. Without, all of them fail.

# %%
for key in ("H2", "H4", "H7"):
    display(Markdown(summary.scores_table(finished(key))))

"""One self-contained HTML page about a run. No scripts, no request to anywhere."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ghm_jax.plots import figures
from ghm_jax.plots.drawing import Sample, sample_grid

_MIN_SCORE = 0.3  # of the detections in the sample pictures
_PICTURE_BYTES = 1_800_000  # all sample pictures together, before base64

_IOU = "averaged over IoU 0.50 to 0.95"
_MERIT = {
    "AP": ("AP", f"average precision, {_IOU}; all classes and sizes"),
    "AP50": ("AP50", "the same at IoU 0.50: found, roughly placed"),
    "AP75": ("AP75", "the same at IoU 0.75: found and well placed"),
    "APs": ("AP small", "AP of objects below 32² pixels"),
    "APm": ("AP medium", "AP of objects from 32² to 96² pixels"),
    "APl": ("AP large", "AP of objects above 96² pixels"),
    "AR1": ("AR 1", f"average recall, {_IOU}; one detection an image"),
    "AR10": ("AR 10", "the same with 10 detections an image"),
    "AR100": ("AR 100", "the same with 100 detections an image"),
    "ARs": ("AR small", "AR 100 of objects below 32² pixels"),
    "ARm": ("AR medium", "AR 100 of objects from 32² to 96² pixels"),
    "ARl": ("AR large", "AR 100 of objects above 96² pixels"),
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #656d76; --grid: #dde2e8;
  --page: #f6f8fa; --card: #ffffff; --accent: #2f81f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9aa4af; --grid: #343b44;
  --page: #0d1117; --card: #161b22; --accent: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 10px; }
p { margin: 0 0 10px; }
.note, .meaning, dt { color: var(--muted); font-size: .875rem; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px;
  padding: 18px; min-width: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 16px; margin-top: 16px; }
.columns.whole { grid-template-columns: 1fr; }
.tiles { display: flex; flex-wrap: wrap; gap: 16px 40px; align-items: flex-end; }
.tile b { display: block; font-size: 2.6rem; line-height: 1.1; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile:first-child b { color: var(--accent); }
dl { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 16px 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: baseline; padding: 6px 12px 6px 0;
  border-top: 1px solid var(--grid); }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; font-weight: 600; text-align: right; }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr));
  gap: 6px 28px; }
.class { display: grid; grid-template-columns: minmax(0, 1fr) 90px 3.2em; gap: 10px;
  align-items: center; font-size: .9rem; }
.class span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.class em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums; }
meter { width: 100%; height: 8px; appearance: none; background: var(--grid); border: 0;
  border-radius: 4px; }
meter::-webkit-meter-bar { background: var(--grid); border: 0; border-radius: 4px; height: 8px; }
meter::-webkit-meter-optimum-value { background: var(--accent); border-radius: 4px; }
meter::-moz-meter-bar { background: var(--accent); border-radius: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
.samples { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; }
details table { margin-top: 12px; font-size: .875rem; }
details td { overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; }
"""


def read_history(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, by rising step.

    A crash tears the last line; lines that are not a record are left out. A run that resumes from a
    checkpoint logs some steps again: a record whose step is not after the one before it replaces
    everything from that step on.

    Raises:
        OSError: the file cannot be read.
    """
    history: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        while history and history[-1]["step"] >= record["step"]:
            history.pop()
        history.append(record)
    return history


def render_report(
    *,
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    figures_of_merit: Mapping[str, float],
    per_class: Mapping[str, float] | None,
    samples: Sequence[Sample],
    class_names: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """The page as text, under 3 MB.

    Args:
        title: headline.
        config: settings by dotted name.
        history: log records as `read_history` gives them. The histograms `ghm_c` and `ghm_r` are
            shown if a record has them.
        figures_of_merit: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as
            fractions of 1; -1: there is nothing to measure it on.
        per_class: AP by class name.
        samples: validation images to draw.
        class_names: names in label order.
        facts: short texts by name (device, versions, training time).

    Raises:
        KeyError: one of the twelve figures is missing.
    """
    floors = ("loss.min_count", "loss.box_min_count")
    # The published losses have no floor, whatever these settings say.
    published = config.get("loss.preset") == "reference"
    floor_c, floor_r = (None if published else config.get(key) for key in floors)
    parts = [
        _headline(title, figures_of_merit, facts),
        _columns(_merit_table(figures_of_merit), _curves(history)),
        _columns(
            _harmonizing("ghm_c", history, floor_c),
            _harmonizing("ghm_r", history, floor_r),
        ),
        _columns(_classes(per_class)),
        _columns(_sample_pictures(samples, class_names)),
        _columns(_settings(config)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(title: str, merit: Mapping[str, float], facts: Mapping[str, str]) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{_fraction(merit[key])}</b>{key} '
        f'<span class="note">{meaning}</span></div>'
        for key, meaning in (("AP", "IoU 0.50 to 0.95"), ("AP50", "IoU 0.50"))
    )
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    return (
        f'<header class="card"><h1>{escape(title)}</h1><div class="tiles">{tiles}</div>'
        f"{f'<dl>{rows}</dl>' if rows else ''}</header>"
    )


def _merit_table(merit: Mapping[str, float]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="number">{_fraction(merit[key])}</td>'
        f'<td class="meaning">{meaning}</td></tr>'
        for key, (name, meaning) in _MERIT.items()
    )
    none = any(merit[key] < 0 for key in _MERIT)
    note = '<p class="note">&ndash; : the split holds no such object.</p>' if none else ""
    return _card("The twelve COCO figures", f"<table>{rows}</table>{note}")


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    harmonized = any(record.get("ghm_c") for record in history)
    note = (
        "The GHM-C loss settles at a level that hardly depends on how good the detector is, "
        "because its weights keep every range of gradient norm equally heavy. Learning shows in "
        "the plain cross-entropy and the plain box error."
        if harmonized
        else "The plain cross-entropy and the plain box error can be compared between runs with "
        "different losses."
    )
    svg = _svg(figures.loss_curves(history), "Losses, plain errors and learning rate over steps")
    return _card("Training", f'{svg}<p class="note">{note}</p>')


def _harmonizing(key: str, history: Sequence[Mapping[str, Any]], floor: float | None) -> str:
    histogram = figures.recent_histogram(history, key)
    if histogram is None:
        return ""
    counts, weights, steps = histogram
    before, after = figures.shares(counts), figures.shares(counts * weights)
    if key == "ghm_c":
        heading, xlabel = (
            "GHM-C: gradient norms of class scores",
            "gradient norm |p \N{MINUS SIGN} p*| of a class score",
        )
        reading = (
            "An example is one anchor and one class; its gradient norm is 0 when the score is "
            "right and 1 when it is entirely wrong. "
            f"The easiest bin holds {_percent(before[0])} of the examples and keeps "
            f"{_percent(after[0])} of the total weight."
        )
    else:
        heading, xlabel = "GHM-R: gradient norms of box errors", "gradient norm of a box coordinate"
        reading = (
            "An example is one coordinate of a positive anchor; its gradient norm is near 0 when "
            "the box fits and near 1 when it is far off. "
            f"The worst bin holds {_percent(before[-1])} of the examples and keeps "
            f"{_percent(after[-1])} of the total weight."
        )
    level = "Blue is level where the weights balance the density"
    if floor:
        level += (
            f"; it falls off in bins with fewer than {floor:g} examples a step (the density "
            "floor), so that a few examples cannot steer the training"
        )
    span = (
        f"Mean of the last {len(steps)} log records, steps {steps[0]} to {steps[-1]}."
        if len(steps) > 1
        else f"Step {steps[0]}."
    )
    svg = _svg(
        figures.harmonizing_panel(counts, weights, "", xlabel),
        f"{heading}, before and after harmonizing",
    )
    body = f'{svg}<p class="note">{reading} {level}.</p><p class="note">{span}</p>'
    return _card(heading, body)


def _classes(per_class: Mapping[str, float] | None) -> str:
    if not per_class:
        return ""
    rows = "".join(
        f'<div class="class"><span title="{escape(name)}">{escape(name)}</span>'
        f'<meter min="0" max="1" value="{value if value >= 0 else 0:.4f}"></meter>'
        f"<em>{_fraction(value)}</em></div>"
        for name, value in per_class.items()
    )
    return _card("AP of each class", f'<div class="classes">{rows}</div>')


def _sample_pictures(samples: Sequence[Sample], class_names: Sequence[str]) -> str:
    if not samples:
        return ""
    max_bytes = _PICTURE_BYTES // len(samples)
    pictures = "".join(
        f'<img loading="lazy" alt="Image {sample.image_id}: ground truth and detections" '
        f'src="{_jpeg(sample_grid([sample], class_names, min_score=_MIN_SCORE), max_bytes)}">'
        for sample in samples
    )
    note = f"Left the ground truth, right the detections with a score of {_MIN_SCORE:.0%} or more."
    body = f'<p class="note">{note}</p><div class="samples">{pictures}</div>'
    return _card("Validation images", body)


def _settings(config: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        for key, value in config.items()
    )
    details = f"<details><summary>Settings</summary><table>{rows}</table></details>"
    return f'<section class="card">{details}</section>'


def _card(heading: str, body: str) -> str:
    return f'<section class="card"><h2>{escape(heading)}</h2>{body}</section>'


def _columns(*cards: str) -> str:
    cards = tuple(card for card in cards if card)
    whole = " whole" if len(cards) == 1 else ""
    return f'<div class="columns{whole}">{"".join(cards)}</div>' if cards else ""


def _fraction(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "&ndash;"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _svg(figure: Figure, label: str) -> str:
    """Inline SVG whose text, grid and ink follow the page's font and colour scheme."""
    buffer = io.StringIO()
    # Text stays text; the salt makes the identifiers reproducible and different in each figure.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    start, rest = svg.split(">", 1)
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    # Several figures share a page: the names of their groups would be there twice.
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    for color, variable in (
        (figures.INK, "--ink"), (figures.MUTED, "--muted"), (figures.GRID, "--grid")
    ):  # fmt: skip
        rest = rest.replace(color, f"var({variable})")
    return f'{start} role="img" aria-label="{escape(label)}">{rest}'


def _jpeg(image: np.ndarray, max_bytes: int) -> str:
    """A data URI; the quality goes down while the picture is larger than `max_bytes`."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    data = np.empty(0, np.uint8)
    for quality in (85, 70, 50, 30):
        _, data = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))
        if data.nbytes <= max_bytes:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()

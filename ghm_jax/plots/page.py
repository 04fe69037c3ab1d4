"""Building blocks of the report: style, cards, inline pictures."""

import base64
import io
import re
import zlib
from html import escape

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ghm_jax.plots import figures

STYLE = """
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
tr.under > td { border-top: 0; padding-top: 0; }
.tide th { white-space: normal; }
.tide meter { min-width: 40px; }
td.number:last-child { padding-right: 0; }
.scroll { overflow-x: auto; }
.confusion { font-size: .75rem; font-variant-numeric: tabular-nums; }
.confusion th, .confusion td { text-align: center; padding: 3px 2px; border: 0;
  max-width: 6em; overflow: hidden; text-overflow: ellipsis; }
.confusion td { background: color-mix(in srgb, var(--accent) calc(var(--share) * 1%), transparent);
  border-radius: 3px; }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; }
details table { margin-top: 12px; font-size: .875rem; }
details td { overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; }
"""


def card(heading: str, body: str) -> str:
    return f'<section class="card"><h2>{escape(heading)}</h2>{body}</section>'


def columns(*cards: str) -> str:
    cards = tuple(card for card in cards if card)
    whole = " whole" if len(cards) == 1 else ""
    return f'<div class="columns{whole}">{"".join(cards)}</div>' if cards else ""


def fraction(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "&ndash;"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def svg(figure: Figure, label: str) -> str:
    """Inline SVG whose text, grid and ink follow the page's font and color scheme."""
    buffer = io.StringIO()
    # Text stays text; the salt makes identifiers reproducible and unique per figure.
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
    # Several figures share a page, so the ids of their groups would not be unique.
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    # Matplotlib derives clip ids from memory addresses; here from their order in the figure.
    for number, clip in enumerate(dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', rest))):
        rest = rest.replace(clip, f"clip-{zlib.crc32(label.encode()):08x}-{number}")
    for color, variable in (
        (figures.INK, "--ink"), (figures.MUTED, "--muted"), (figures.GRID, "--grid")
    ):  # fmt: skip
        rest = rest.replace(color, f"var({variable})")
    return f'{start} role="img" aria-label="{escape(label)}">{rest}'


def jpeg(image: np.ndarray, max_bytes: int) -> str:
    """A data URI; the quality is lowered while the picture is larger than `max_bytes`."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    data = np.empty(0, np.uint8)
    for quality in (85, 70, 50, 30):
        _, data = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))
        if data.nbytes <= max_bytes:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()

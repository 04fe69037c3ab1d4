"""A self-contained HTML page about a run, without scripts and external resources."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ghm_jax.plots import figures
from ghm_jax.plots.drawing import Sample, sample_grid
from ghm_jax.plots.error_cards import error_cards
from ghm_jax.plots.page import STYLE, card, columns, fraction, jpeg, percent, svg
from ghm_jax.plots.panel import stats_panel
from ghm_jax.runs.metrics import METRICS

_MIN_SCORE = 0.3  # of the detections in the sample pictures
_PICTURE_BYTES = 1_800_000  # of all sample pictures, before base64


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
    errors: Mapping[str, Any] | None = None,
    stats: Mapping[str, Any] | None = None,
) -> str:
    """The page as text, under 3 MB.

    Args:
        title: headline.
        config: settings by dotted name.
        history: log records, see `ghm_jax.runs.history.read_history`. The histograms `ghm_c` and
            `ghm_r` are shown if a record has them.
        figures_of_merit: the twelve `METRICS`.
        per_class: AP by class name.
        samples: validation images to draw.
        class_names: names in label order.
        facts: short texts by name (device, versions, training time).
        errors: of the detections, from `ghm_jax.evaluation.error_analysis.error_analysis`.
        stats: of the network, from `ghm_jax.analysis.gradient_stats.gradient_stats`.

    Raises:
        KeyError: one of the twelve figures is missing.
    """
    cards = [
        _headline(title, figures_of_merit, facts),
        columns(_merit_table(figures_of_merit), _curves(history)),
        columns(
            _harmonizing("ghm_c", history, config.get("loss.ghm_c.min_count")),
            _harmonizing("ghm_r", history, config.get("loss.ghm_r.min_count")),
        ),
        columns(*_gradients(stats)),
        columns(_classes(per_class)),
        *error_cards(errors),
        columns(_sample_pictures(samples, class_names)),
        columns(_settings(config)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(card for card in cards if card)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(title: str, merit: Mapping[str, float], facts: Mapping[str, str]) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{fraction(merit[key])}</b>{key} '
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
        f'<tr><th scope="row">{name}</th><td class="number">{fraction(merit[name])}</td>'
        f'<td class="meaning">{meaning}</td></tr>'
        for name, meaning in METRICS.items()
    )
    none = any(merit[name] < 0 for name in METRICS)
    note = '<p class="note">&ndash; : the split has no such object.</p>' if none else ""
    return card("The twelve COCO figures", f"<table>{rows}</table>{note}")


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    harmonized = any(record.get("ghm_c") for record in history)
    note = (
        "The GHM-C loss converges to a level that hardly depends on how good the detector is, "
        "because its weights give every bin of gradient norm the same total weight. Look at the "
        "plain cross-entropy and the plain box error to see progress."
        if harmonized
        else "The plain cross-entropy and the plain box error are comparable between runs with "
        "different losses."
    )
    picture = svg(figures.loss_curves(history), "Losses, plain errors and learning rate over steps")
    return card("Training", f'{picture}<p class="note">{note}</p>')


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
            "An example is an (anchor, class) pair; its gradient norm is 0 when the score is right "
            "and 1 when it is completely wrong. "
            f"The easiest bin has {percent(before[0])} of the examples and, after harmonizing, "
            f"{percent(after[0])} of the total weight."
        )
    else:
        heading, xlabel = "GHM-R: gradient norms of box errors", "gradient norm of a box coordinate"
        reading = (
            "An example is a coordinate of a positive anchor; its gradient norm is near 0 when the "
            "box is accurate and near 1 when it is far off. "
            f"The hardest bin has {percent(before[-1])} of the examples and, after harmonizing, "
            f"{percent(after[-1])} of the total weight."
        )
    level = "The blue line is flat where the weights balance the density"
    if floor:
        level += (
            f"; it drops in bins with fewer than {floor:g} examples per step (the density floor), "
            "so that a few examples cannot dominate training"
        )
    span = (
        f"Mean over the last {len(steps)} log records, steps {steps[0]} to {steps[-1]}."
        if len(steps) > 1
        else f"Step {steps[0]}."
    )
    picture = svg(
        figures.harmonizing_panel(counts, weights, "", xlabel),
        f"{heading}, before and after harmonizing",
    )
    body = f'{picture}<p class="note">{reading} {level}.</p><p class="note">{span}</p>'
    return card(heading, body)


def _gradients(stats: Mapping[str, Any] | None) -> list[str]:
    """Cards of the gradient statistics of the trained network."""
    if not stats:
        return []
    headings = {"classification": "Class scores now", "box": "Boxes now"}
    notes = {
        "classification": "For each bin of gradient norm: number of examples, their weight, and "
        "their share of the gradient.",
        "box": "The same for the coordinates of positive anchors.",
    }
    span = f"{stats['images']} images of {stats['split']}, step {stats['step']}."
    cards = []
    for term, heading in headings.items():
        figure = stats_panel(term, stats[term], stats["batch_size"])
        picture = svg(figure, f"{heading}: gradient norms, weights and gradients")
        cards.append(card(heading, f'{picture}<p class="note">{notes[term]} {span}</p>'))
    return cards


def _classes(per_class: Mapping[str, float] | None) -> str:
    if not per_class:
        return ""
    rows = "".join(
        f'<div class="class"><span title="{escape(name)}">{escape(name)}</span>'
        f'<meter min="0" max="1" value="{value if value >= 0 else 0:.4f}"></meter>'
        f"<em>{fraction(value)}</em></div>"
        for name, value in per_class.items()
    )
    return card("AP by class", f'<div class="classes">{rows}</div>')


def _sample_pictures(samples: Sequence[Sample], class_names: Sequence[str]) -> str:
    if not samples:
        return ""
    max_bytes = _PICTURE_BYTES // len(samples)
    pictures = "".join(
        f'<img loading="lazy" alt="Image {sample.image_id}: ground truth and detections" '
        f'src="{jpeg(sample_grid([sample], class_names, min_score=_MIN_SCORE), max_bytes)}">'
        for sample in samples
    )
    note = f"Left: ground truth. Right: detections with a score of at least {_MIN_SCORE:.0%}."
    body = f'<p class="note">{note}</p><div class="samples">{pictures}</div>'
    return card("Validation images", body)


def _settings(config: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        for key, value in config.items()
    )
    details = f"<details><summary>Settings</summary><table>{rows}</table></details>"
    return f'<section class="card">{details}</section>'

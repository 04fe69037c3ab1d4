"""Cards of the report about errors: error types, curves, scores, calibration, confusion."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ghm_jax.plots import figures
from ghm_jax.plots.figures import BLUE, GREEN, INK, MUTED, ORANGE
from ghm_jax.plots.page import card, columns, percent, svg

_KINDS = {
    "Cls": ("classification", "wrong class, IoU at least 0.5"),
    "Loc": ("localization", "right class, IoU from 0.1 to 0.5"),
    "Both": ("both", "wrong class, IoU from 0.1 to 0.5"),
    "Dupe": ("duplicate", "of an object that was detected with a higher score"),
    "Bkg": ("background", "no object, IoU below 0.1"),
    "Miss": ("missed", "object not detected, not even with a classification or localization error"),
}
_MATRIX_CLASSES = 12  # more do not fit on a phone: pairs are listed instead
_PAIRS = 15


def error_cards(errors: Mapping[str, Any] | None) -> list[str]:
    """Cards of the `ghm_jax.evaluation.error_analysis`; none without detections or objects."""
    if not errors or errors["tide"] is None:
        return []
    return [
        columns(_tide(errors["tide"]), _precision_recall(errors["precision_recall"])),
        columns(_scores(errors["scores"]), _calibration(errors["calibration"])),
        columns(_confusion(errors["confusion"])),
    ]


def _tide(tide: Mapping[str, Any]) -> str:
    largest = max([tide["delta_ap"][kind] for kind in _KINDS] + [0.01])
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td><meter min="0" max="{largest:.4f}" '
        f'value="{max(tide["delta_ap"][kind], 0):.4f}"></meter></td>'
        f'<td class="number">{tide["delta_ap"][kind]:.3f}</td>'
        f'<td class="number">{tide["counts"][kind]:,}</td></tr>'
        f'<tr class="under"><td class="meaning" colspan="4">{meaning}</td></tr>'
        for kind, (name, meaning) in _KINDS.items()
    )
    head = '<tr><th>error</th><td></td><td class="number">AP50</td><td class="number">count</td>'
    both = tide["delta_ap"]["FP"], tide["delta_ap"]["FN"]
    note = (
        f"The number is the AP50 gained if these errors were fixed (TIDE); AP50 is "
        f"{tide['ap']:.3f}. The gains do not add up. Without false positives AP50 would be "
        f"{both[0]:.3f} higher, without missed objects {both[1]:.3f}."
    )
    body = f'<table class="tide">{head}</tr>{rows}</table><p class="note">{note}</p>'
    return card("What is wrong", body)


def _precision_recall(curves: Mapping[str, Any]) -> str:
    figure, ax = _axes("precision")
    for (iou, precision), color in zip(
        curves["precision"].items(), (GREEN, BLUE, ORANGE), strict=False
    ):
        # Precision is 0 by definition beyond the highest recall: the line ends there.
        y = np.array(precision, np.float64)
        y = np.where(y > 0, y, np.nan)
        ax.plot(curves["recall"], y, color=color, lw=1.6, label=f"IoU {iou}")
    ax.set_xlabel("recall", color=INK, fontsize=9)
    figures.legend(ax)
    note = "Means over the classes. A line ends at the highest recall reached."
    picture = svg(figure, "Precision over recall")
    return card("Precision and recall", f'{picture}<p class="note">{note}</p>')


def _scores(scores: Mapping[str, Any]) -> str:
    correct, wrong = (np.array(scores[key], np.float64) for key in ("correct", "wrong"))
    edges = np.linspace(0.0, 1.0, len(correct) + 1)
    figure, ax = _axes("detections")
    for counts, label, color in ((wrong, "wrong", ORANGE), (correct, "correct", BLUE)):
        ax.stairs(counts, edges, fill=True, color=color, alpha=0.2, lw=0)
        line = np.where(counts > 0, counts, np.nan)
        ax.stairs(line, edges, color=color, lw=1.5, baseline=None, label=label)
    figures.log_axis(ax, np.concatenate([correct, wrong]), figures.plain)
    ax.set_xlim(0, 1)
    ax.set_xlabel("score", color=INK, fontsize=9)
    figures.legend(ax)
    total = correct.sum() + wrong.sum()
    high = correct[len(correct) // 2 :].sum(), wrong[len(wrong) // 2 :].sum()
    note = (
        f"{total:,.0f} detections, {percent(correct.sum() / max(total, 1))} of them correct at "
        f"IoU 0.5. With a score of at least 0.5: {high[0]:,.0f} correct, {high[1]:,.0f} wrong."
    )
    picture = svg(figure, "Scores of correct and wrong detections")
    return card("Scores", f'{picture}<p class="note">{note}</p>')


def _calibration(calibration: Mapping[str, Any]) -> str:
    bins = [each for each in calibration["bins"] if each["count"]]
    figure, ax = _axes("precision")
    ax.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    score = [each["score"] for each in bins]
    ax.plot(score, [each["precision"] for each in bins], color=BLUE, lw=1.5, marker="o", ms=4)
    ax.set_xlabel("score", color=INK, fontsize=9)
    note = (
        "Precision of the detections at IoU 0.5, by score. On the dashed line scores are "
        "calibrated probabilities; below it the detector is overconfident, above it "
        f"underconfident. Expected calibration error: {calibration['ece']:.3f} (maximum "
        f"{calibration['mce']:.3f})."
    )
    picture = svg(figure, "Precision of detections by score")
    return card("Calibration", f'{picture}<p class="note">{note}</p>')


def _confusion(confusion: Mapping[str, Any]) -> str:
    names = confusion["names"]
    matrix = np.array(confusion["matrix"], np.int64)
    note = (
        f"Detections with a score of at least {confusion['min_score']:g}, matched to objects of "
        "any class at IoU 0.5."
    )
    if len(names) <= _MATRIX_CLASSES:
        body = _matrix(names, matrix)
        note += " Rows: true class. Columns: detected class. Shading: share of the row."
    else:
        body = _pairs(names, matrix)
        note += " The most frequent confusions of two classes."
    return card("Confusion", f'{body}<p class="note">{note}</p>')


def _matrix(names: list[str], matrix: np.ndarray) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [*names, "missed"])
    rows = []
    for i, name in enumerate([*names, "background"]):
        total = max(matrix[i].sum(), 1)
        cells = "".join(
            f'<td style="--share:{70 * value / total:.0f}">{value or ""}</td>'
            for value in matrix[i].tolist()
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="confusion"><tr><th></th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _pairs(names: list[str], matrix: np.ndarray) -> str:
    between = matrix[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    order = np.argsort(-between, axis=None, kind="stable")[:_PAIRS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, between.shape), strict=True)]
    rows = "".join(
        f"<tr><td>{escape(names[i])} detected as {escape(names[j])}</td>"
        f'<td class="number">{between[i, j]}</td>'
        f'<td class="number">{percent(between[i, j] / matrix[i].sum())}</td></tr>'
        for i, j in pairs
        if between[i, j]
    )
    head = '<tr><th>confusion</th><td class="number">count</td><td class="number">share</td></tr>'
    return f"<table>{head}{rows}</table>"


def _axes(unit: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(figures.WIDTH, 3.4), dpi=figures.DPI, layout="constrained")
    ax = figure.subplots()
    figures.style(ax, "", unit)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.xaxis.set_major_formatter(figures.plain)
    ax.yaxis.set_major_formatter(figures.plain)
    return figure, ax

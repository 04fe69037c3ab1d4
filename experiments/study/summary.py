"""Tables of the study's results. No figure is typed by hand."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.study.plan import GRID, Entry, Question, Trial, final_trials, tuning_trials

Results = Mapping[str, Mapping[str, Any]]
"""Results of finished trials, by their keys."""


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The finished trials; a last line that was cut off by a crash is no result."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"]] = record
    return found


def tune(question: Question, entry: Entry, results: Results) -> tuple[list[Trial], Trial | None]:
    """The trials that an entry is tuned with, and the best; None: some are still to be run."""
    trials = tuning_trials(question, entry)
    if not question.tuned:
        return [], trials[0]
    while all(trial.key in results for trial in trials):
        best = max(trials, key=lambda trial: ap_of(results[trial.key]))
        further = [trial for trial in best.neighbours() if trial not in trials]
        if not further:
            return trials, best
        trials += further
    return trials, None


def ap_of(run: Mapping[str, Any]) -> float:
    """AP of a finished trial."""
    return run["metrics"]["AP"]


class Row(NamedTuple):
    """One loss on one data set."""

    entry: Entry
    data: str
    setting: Trial
    runs: tuple[Mapping[str, Any], ...]
    """By seed."""

    def values(self, of: Callable[[Mapping[str, Any]], float]) -> list[float]:
        """A figure of each run."""
        return [of(run) for run in self.runs]

    @property
    def ap(self) -> list[float]:
        """Of each run."""
        return self.values(ap_of)


def rows(question: Question, results: Results) -> list[Row]:
    """The rows whose runs are all finished."""
    found = []
    for entry in question.entries:
        _, best = tune(question, entry, results)
        if best is None:
            continue
        finals = final_trials(question, entry, best)
        for data in question.data:
            keys = [trial.key for trial in finals if trial.data == data]
            if all(key in results for key in keys):
                found.append(Row(entry, data, best, tuple(results[key] for key in keys)))
    return found


def paired_difference(row: Row, other: Row) -> tuple[float, float, float]:
    """Mean, smallest and largest difference in AP between two rows, seed by seed."""
    differences = [a - b for a, b in zip(row.ap, other.ap, strict=True)]
    return statistics.mean(differences), min(differences), max(differences)


def scores_table(found: Sequence[Row]) -> str:
    """AP of each row. The difference is to the loss whose setting it takes, or else to the first
    row of the same data set."""
    lines = []
    for row in found:
        same_data = [other for other in found if other.data == row.data]
        same_setting = [other for other in same_data if other.entry is row.entry.like]
        first, *_ = same_setting + same_data
        mean, low, high = paired_difference(row, first)
        difference = f"{mean:+.3f}" + f" ({low:+.3f} to {high:+.3f})" * (len(row.runs) > 1)
        lines.append(
            (
                row.data,
                row.entry.name,
                f"x {row.setting.learning_rate:g}",
                f"x {row.setting.weight:g}",
                mean_and_range(row.ap),
                difference if row is not first else "",
            )
        )
    head = ("data", "loss", "rate", "weight", "AP (range)", "difference, by seed (range)")
    return markdown(head, lines)


IOUS = ("0.50", "0.60", "0.70", "0.80", "0.90")


def iou_table(found: Sequence[Row]) -> str:
    """AP of each row by IoU, and the recall of 100 detections per image; means over the seeds."""

    def means(row: Row) -> list[str]:
        figures = [row.values(lambda run, iou=iou: run["ap_by_iou"][iou]) for iou in IOUS]
        figures.append(row.values(lambda run: run["metrics"]["AR100"]))
        return [f"{statistics.mean(values):.3f}" for values in figures]

    lines = [(row.data, row.entry.name, f"x {row.setting.weight:g}", *means(row)) for row in found]
    head = ("data", "loss", "weight", *(f"AP at IoU {iou}" for iou in IOUS), "AR100")
    return markdown(head, lines)


def outliers_table(found: Sequence[Row]) -> str:
    """AP of each loss on each data set, and the share of its AP on the first that is left."""
    of_loss: dict[str, dict[str, Row]] = {}
    for row in found:
        of_loss.setdefault(row.entry.name, {})[row.data] = row
    clean, *spoilt = dict.fromkeys(row.data for row in found)

    def cells(by_data: Mapping[str, Row], of: Callable[[Row], list[float]]) -> list[str]:
        return [mean_and_range(of(by_data[x])) if x in by_data else "" for x in spoilt]

    lines = []
    for loss, by_data in of_loss.items():
        base = by_data[clean]
        aps = cells(by_data, lambda row: row.ap)
        left = cells(by_data, lambda row, base=base: list(map(truediv, row.ap, base.ap)))
        lines.append((loss, mean_and_range(base.ap), *aps, *left))
    return markdown(("loss", clean, *spoilt, *(f"left with {name}" for name in spoilt)), lines)


def calibration_table(found: Sequence[Row]) -> str:
    """Expected calibration error of each row."""
    lines = [
        (row.data, row.entry.name, mean_and_range(row.values(lambda run: run["ece"])))
        for row in found
    ]
    return markdown(("data", "loss", "expected calibration error (range)"), lines)


def at_base_weight(found: Iterable[Row]) -> list[Row]:
    """Those that were trained with the base weight of their loss."""
    return [row for row in found if row.setting.weight == 1.0]


def pooled_bins(row: Row) -> list[tuple[float, float, int]]:
    """Mean score, precision and number of detections by bin of score, seeds together.

    Score and precision of a bin without detections are 0.
    """
    pooled = []
    for bins in zip(*(run["reliability"] for run in row.runs), strict=True):
        count = sum(each["count"] for each in bins)
        score, precision = (
            sum(each[key] * each["count"] for each in bins) / max(count, 1)
            for key in ("score", "precision")
        )
        pooled.append((score, precision, count))
    return pooled


def bins_table(found: Sequence[Row]) -> str:
    """Precision and number of detections by score, seeds together."""
    head, columns = ["score"], [[f"{i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(10)]]
    for row in found:
        head += [f"{row.entry.name}: precision", "detections"]
        bins = pooled_bins(row)
        columns.append([f"{precision:.3f}" for _, precision, _ in bins])
        columns.append([f"{count:,}" for _, _, count in bins])
    return markdown(head, zip(*columns, strict=True))


def tuning_table(question: Question, results: Results) -> str:
    """AP of the tuning runs of each loss so far, by setting."""
    found = {}
    for entry in question.entries:
        trials, _ = tune(question, entry, results)
        aps = {
            (trial.learning_rate, trial.weight): f"{ap_of(results[trial.key]):.3f}"
            for trial in trials
            if trial.key in results
        }
        if aps and not entry.like:
            found[entry.name] = aps
    settings = sorted({setting for aps in found.values() for setting in aps})
    head = ("loss", *(f"rate x {rate:g}, weight x {weight:g}" for rate, weight in settings))
    lines = [(name, *(aps.get(x, "") for x in settings)) for name, aps in found.items()]
    return markdown(head, lines)


def sensitivity_table(question: Question, results: Results) -> str:
    """How much each loss depends on learning rate and weight: its AP over the grid (H6)."""
    lines = []
    for entry in question.entries:
        keys = [trial.key for trial in tuning_trials(question, entry)]
        if entry.grid == GRID and not entry.like and all(key in results for key in keys):
            aps = [ap_of(results[key]) for key in keys]
            values = (max(aps), statistics.median(aps), min(aps), min(aps) / max(aps))
            lines.append((entry.name, *(f"{value:.3f}" for value in values)))
    return markdown(("loss", "best", "median", "worst", "worst / best"), lines)


FEW = 10
"""Examples on average in a bin that is called sparse."""


def noise_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Noise of the class head's gradient over batches, of the measurements of `variance.py`.

    Sums over the bins; the slope is that of a line through the bins with one example or more, in
    logarithms: variance over the square of the bin's gradient norm, against its examples.
    """
    lines = []
    for row in rows:
        counts = np.array(row["counts"])
        norms = (np.arange(len(counts)) + 0.5) / len(counts)
        for name in row["at_rest"]:
            variance = np.array(row[name]["variance"])
            total, signal = variance.sum(), sum(row[name]["mean_squared"])
            sparse = variance[counts < FEW].sum() / total
            seen = counts >= 1
            per_norm = np.log(variance[seen] / norms[seen] ** 2)
            slope, _ = np.polyfit(np.log(counts[seen]), per_norm, 1)
            figures = (f"{total / signal:.2f}", f"{sparse:.0%}", f"{slope:.2f}")
            lines.append((row["trained with"], name, *figures))
    head = ("state trained with", "gradient with", "variance / squared mean")
    head = (*head, f"variance from bins of less than {FEW}", "slope")
    return markdown(head, lines)


def rest_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Share of positive examples by score: measured, and where the gradients of the loss that the
    state was trained with cancel; empty where no positive example has such a score."""
    head, columns = ["score"], [[f"{score:.2f}" for score in rows[0]["score"]]]
    for row, floor in zip(rows, rows[0]["at_rest"], strict=True):
        head += [f"{row['trained with']}: positive", "gradients cancel at"]
        for shares in (row["positive"], row["at_rest"][floor]):
            pairs = zip(shares, row["positive"], strict=True)
            columns.append([f"{share:.3f}" if seen > 0 else "" for share, seen in pairs])
    return markdown(head, list(zip(*columns, strict=True))[1::3])


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def mean_and_range(values: Sequence[float]) -> str:
    """`mean (smallest to largest)`."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean

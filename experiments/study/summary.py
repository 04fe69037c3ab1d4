"""Tables of the study's results. No figure is typed by hand."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.study.plan import SEEDS, Entry, Question, Trial, final_trials, tuning_trials

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


def best_setting(results: Results, trials: Iterable[Trial]) -> Trial | None:
    """The trial with the highest AP; None: some are missing."""
    trials = list(trials)
    if any(trial.key not in results for trial in trials):
        return None
    return max(trials, key=lambda trial: results[trial.key]["metrics"]["AP"])


class Row(NamedTuple):
    """One loss on one data set."""

    entry: Entry
    data: str
    setting: Trial
    values: tuple[float, ...]
    """By seed."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.values)


def rows(
    question: Question,
    results: Results,
    steps: int,
    seeds: tuple[int, ...] = SEEDS,
    metric: str = "AP",
) -> list[Row]:
    """The rows whose runs are all finished."""
    found = []
    for entry in question.entries:
        best = best_setting(results, tuning_trials(question, entry, steps))
        if best is None:
            continue
        finals = final_trials(question, entry, best, steps, seeds)
        for data in question.data:
            keys = [trial.key for trial in finals if trial.data == data]
            if all(key in results for key in keys):
                values = tuple(results[key]["metrics"][metric] for key in keys)
                found.append(Row(entry, data, best, values))
    return found


def paired_difference(row: Row, other: Row) -> tuple[float, float, float]:
    """Mean, smallest and largest difference between two rows, seed by seed."""
    differences = [a - b for a, b in zip(row.values, other.values, strict=True)]
    return statistics.mean(differences), min(differences), max(differences)


def table(question: Question, results: Results, steps: int, seeds: tuple[int, ...] = SEEDS) -> str:
    """Markdown; the differences are to the first finished row of the same data set."""
    lines = [
        "| data | loss | rate | weight | AP | range | difference, by seed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = rows(question, results, steps, seeds)
    for row in found:
        first = next(other for other in found if other.data == row.data)
        mean, low, high = paired_difference(row, first)
        difference = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if row is not first else ""
        lines.append(
            f"| {row.data} | {row.entry.name} | x {row.setting.learning_rate:g} "
            f"| x {row.setting.weight:g} | {row.mean:.3f} "
            f"| {min(row.values):.3f} to {max(row.values):.3f} | {difference} |"
        )
    return "\n".join(lines)

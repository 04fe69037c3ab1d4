"""The study of the losses: trains what is missing, one run on each core, side by side.

    python -m experiments.study [--only H1 H5] [--data-dir data] [--cores 0 1]
    python -m experiments.study --table
    python -m experiments.study --smoke

Each finished run is a line of experiments/results/study/runs.jsonl, and no run is trained twice: a
study that was stopped goes on where it was, within a run as well. `plan.py` has the questions and
the rules. The data sets with outliers are made in `--data-dir` (see `outliers.py`); `bccd` and
`deeppcb` must have been prepared there with `ghm-jax data prepare folder`, else their runs are
skipped.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import tyro

from experiments.study.outliers import KINDS, SOURCE, make_outliers
from experiments.study.plan import QUESTIONS, STEPS, Entry, Question, Trial, final_trials
from experiments.study.summary import read_results, rows, scores_table, tune
from ghm_jax.config import to_dict

RESULTS = Path(__file__).parents[1] / "results" / "study" / "runs.jsonl"


class Study:
    """What is finished, and where more is trained."""

    def __init__(self, results: Path, data_dir: str, runs: Path, cores: Sequence[int]) -> None:
        self.results, self.data_dir, self.runs = results, data_dir, runs
        self.finished = read_results(results)
        self._cores: SimpleQueue[int] = SimpleQueue()
        for core in cores:
            self._cores.put(core)
        self._workers = len(cores)

    def train(self, trials: Sequence[Trial]) -> None:
        """Trains those that are not finished, and adds a line to the results for each."""
        missing = {trial.key: trial for trial in trials if trial.key not in self.finished}
        for name in {trial.data for trial in missing.values()}:
            make_outliers(name, self.data_dir)
        with ThreadPoolExecutor(self._workers) as pool:
            for record in pool.map(self._run, missing.values()):
                self.finished[record["key"]] = record

    def _run(self, trial: Trial) -> dict[str, Any]:
        core = self._cores.get()
        try:
            name = "".join(c if c.isalnum() else "_" for c in trial.key)
            with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
                json.dump(to_dict(trial.config(self.data_dir)), config)
                config.flush()
                command = [sys.executable, "-m", "experiments.study.trial", config.name]
                command += [str(self.runs / name), "--core", str(core)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        finally:
            self._cores.put(core)
        record = {"key": trial.key, **json.loads(done.stdout.splitlines()[-1])}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        add_line(self.results, json.dumps(record))
        print(f"{record['metrics']['AP']:.3f} AP in {record['seconds']:>4} s: {trial.key}")
        return record


def main(
    only: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    steps: int = STEPS,
    data_dir: str = "data",
    results: Path = RESULTS,
    runs: Path = Path("runs/study"),
    cores: tuple[int, ...] = (),
    smoke: bool = False,
    table: bool = False,
) -> None:
    """Trains the study, or shows its tables.

    Args:
        only: keys of the questions, such as H1; empty: all.
        seeds: of the final runs; empty: those of the plan.
        steps: of every run.
        data_dir: where the data sets are.
        results: where finished runs are.
        runs: directory for the runs in progress.
        cores: numbers of the CPU cores to train on; empty: all.
        smoke: a few steps of the first loss of each question, to see that all works.
        table: only print the tables of what is finished.
    """
    questions = [question for question in QUESTIONS if not only or question.key in only]
    if unknown := set(only) - {question.key for question in QUESTIONS}:
        raise SystemExit(f"no question {', '.join(sorted(unknown))}: see plan.py")
    if smoke:
        steps, seeds = 4, seeds[:1] or (1,)
        questions = [shortened(question) for question in questions]
    if not table:
        study = Study(results, data_dir, runs, cores or range(os.cpu_count() or 1))
        for question in questions:
            for trials in batches(question, study, steps, seeds):
                study.train(trials)
    print_tables(questions, read_results(results), steps, seeds)


def add_line(path: Path, line: str) -> None:
    """Appends a line, on its own even if a crash cut off the last one."""
    cut_off = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" * cut_off + line + "\n")


def batches(
    question: Question, study: Study, steps: int, seeds: tuple[int, ...]
) -> Iterator[list[Trial]]:
    """The runs of a question: those for tuning, then the final ones with what was best.

    Two losses at a time, so that a study that is stopped has finished rows; one may be tuned while
    the other is trained.
    """
    if not has_data(question.data[0], study.data_dir):
        print(f"{question.key}: no {question.data[0]} in {study.data_dir}, skipped")
        return
    for start in range(0, len(question.entries), 2):
        entries = question.entries[start : start + 2]
        while missing := [
            trial
            for entry in entries
            for trial in next_trials(question, entry, study, steps, seeds)
            if trial.key not in study.finished
        ]:
            yield missing


def next_trials(
    question: Question, entry: Entry, study: Study, steps: int, seeds: tuple[int, ...]
) -> list[Trial]:
    """Those for tuning a loss until its best setting is known, then the final ones."""
    tuning, best = tune(question, entry, study.finished, steps)
    if best is None:
        return tuning
    finals = final_trials(question, entry, best, steps, seeds)
    return [trial for trial in finals if has_data(trial.data, study.data_dir)]


def has_data(name: str, data_dir: str) -> bool:
    """Whether a data set is there, or is made when it is needed."""
    prepared = Path(data_dir) / name
    return prepared.is_dir() or name.startswith((SOURCE, *KINDS))


def shortened(question: Question) -> Question:
    """One loss, two settings at first, two data sets."""
    first = question.entries[0]
    first = replace(first, grid=first.grid[:2])
    return replace(question, entries=(first,), data=question.data[:2])


def print_tables(
    questions: Sequence[Question], results: dict[str, Any], steps: int, seeds: tuple[int, ...]
) -> None:
    """What is finished."""
    for question in questions:
        print(f"\n{question.key}. {question.title}\n")
        print(scores_table(rows(question, results, steps, seeds)))


if __name__ == "__main__":
    tyro.cli(main)

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import tyro

from experiments.study.outliers import KINDS, SOURCE, make_outliers
from experiments.study.plan import QUESTIONS, Question, Trial, final_trials
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

    def train(self, wanted: Callable[[], Iterable[Trial]]) -> None:
        """Trains what is wanted and not finished, and adds a line to the results for each run.

        What is wanted is asked again after each run, as tuning goes on from what is finished.
        """
        running: dict[Future[dict[str, Any]], str] = {}
        with ThreadPoolExecutor(self._workers) as pool:
            while True:
                missing = (
                    trial
                    for trial in wanted()
                    if trial.key not in self.finished and trial.key not in running.values()
                )
                for trial in islice(missing, self._workers - len(running)):
                    make_outliers(trial.data, self.data_dir)
                    running[pool.submit(self._run, trial)] = trial.key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self.finished[running.pop(future)] = future.result()

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
    steps: int = 0,
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
        steps: of every run; 0: those of the plan.
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
    questions = [changed(question, steps, seeds) for question in questions]
    if not table:
        for question in questions:
            if not has_data(question.data[0], data_dir):
                print(f"{question.key}: no {question.data[0]} in {data_dir}, skipped")
        study = Study(results, data_dir, runs, cores or range(os.cpu_count() or 1))
        study.train(lambda: next_trials(questions, study))
    print_tables(questions, read_results(results))


def add_line(path: Path, line: str) -> None:
    """Appends a line, on its own even if a crash cut off the last one."""
    cut_off = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" * cut_off + line + "\n")


def next_trials(questions: Sequence[Question], study: Study) -> Iterator[Trial]:
    """For each loss those for tuning, until its best setting is known, then the final ones."""
    for question in questions:
        if not has_data(question.data[0], study.data_dir):
            continue
        for entry in question.entries:
            tuning, best = tune(question, entry, study.finished)
            if best is None:
                yield from tuning
                continue
            for trial in final_trials(question, entry, best):
                if has_data(trial.data, study.data_dir):
                    yield trial


def has_data(name: str, data_dir: str) -> bool:
    """Whether a data set is there, or is made when it is needed."""
    prepared = Path(data_dir) / name
    return prepared.is_dir() or name.startswith((SOURCE, *KINDS))


def shortened(question: Question) -> Question:
    """One loss, two settings at first, two data sets."""
    first = question.entries[0]
    first = replace(first, grid=first.grid[:2])
    return replace(question, entries=(first,), data=question.data[:2])


def changed(question: Question, steps: int, seeds: tuple[int, ...]) -> Question:
    """With other steps for every run, and other seeds; 0 and (): those of the plan."""
    if steps:
        question = replace(question, steps=steps, longer={})
    return replace(question, seeds=seeds or question.seeds)


def print_tables(questions: Sequence[Question], results: dict[str, Any]) -> None:
    """What is finished."""
    for question in questions:
        print(f"\n{question.key}. {question.title}\n")
        print(scores_table(rows(question, results)))


if __name__ == "__main__":
    tyro.cli(main)

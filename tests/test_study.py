"""The study's rules, and one small run of it by its command."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.study.__main__ import Study, add_line, changed
from experiments.study.outliers import corrupted
from experiments.study.plan import (
    FOCAL,
    GRID,
    QUESTIONS,
    SEEDS,
    TUNING_SEED,
    Question,
    final_trials,
    tuning_trials,
)
from experiments.study.summary import (
    Row,
    bins_table,
    calibration_table,
    iou_table,
    outliers_table,
    paired_difference,
    pooled_bins,
    read_results,
    rows,
    scores_table,
    sensitivity_table,
    tune,
    tuning_table,
)
from experiments.study.trial import ap_by_iou

ROOT = Path(__file__).parents[1]


def results_of(question: Question, ap) -> dict:
    """A record for every trial, with the AP that a function of it gives."""

    def record(trial):
        value = ap(trial)
        return {
            "metrics": {"AP": value, "AR100": value + 0.1},
            "ap_by_iou": {f"{iou:.2f}": value + 0.55 - iou for iou in np.arange(0.5, 1, 0.05)},
            "ece": 1 - value,
        }

    found = {}
    for entry in question.entries:
        best = None
        while best is None:
            tuning, best = tune(question, entry, found)
            found |= {trial.key: record(trial) for trial in tuning}
        finals = final_trials(question, entry, best)
        found |= {trial.key: record(trial) for trial in finals}
    return found


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.key)
def test_every_run_of_the_study_has_a_valid_config_and_a_name_of_its_own(question):
    configs = {}
    for entry in question.entries:
        tuning = tuning_trials(question, entry)
        finals = final_trials(question, entry, tuning[0])
        for trial in (*tuning, *finals):
            configs[trial.key] = trial.config("data").check()
    finals = len(question.entries) * len(question.data) * len(question.seeds)
    tuned = [entry.like or entry for entry in question.entries]
    settings = {(entry.name, *setting) for entry in tuned for setting in entry.grid}
    assert len(configs) == len(settings) + finals
    assert len(set(map(repr, configs.values()))) == len(configs)
    assert TUNING_SEED not in SEEDS


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.key)
def test_tuning_changes_the_learning_rate_and_the_weight_that_is_compared(question):
    entry = question.entries[-1].like or question.entries[-1]
    grid = {(0.5, 1), (2, 1), (1, 0.5), (1, 2)} if entry.grid == GRID else {(1, 0.5), (1, 2)}
    base, *others = (t.config("data") for t in tuning_trials(question, entry))
    name = entry.tuned.removeprefix("loss.")
    weight = getattr(base.loss, name)
    assert weight > 0
    found = {
        (c.optimizer.learning_rate / base.optimizer.learning_rate, getattr(c.loss, name) / weight)
        for c in others
    }
    assert found == grid
    for config in others:  # nothing else
        same = replace(config, loss=base.loss, optimizer=base.optimizer)
        assert same == base
        assert replace(config.loss, **{name: weight}) == base.loss


def test_the_final_runs_take_the_setting_that_was_best_and_no_seed_of_the_tuning():
    question = QUESTIONS[0]
    best = {entry.name: entry.grid[i % len(entry.grid)] for i, entry in enumerate(question.entries)}

    def ap(trial):
        chosen = (trial.learning_rate, trial.weight) == best[trial.entry.name]
        return 0.5 + 0.2 * chosen + 0.01 * trial.seed

    found = rows(question, results_of(question, ap))
    assert [row.entry.name for row in found] == [entry.name for entry in question.entries]
    for row in found:
        assert (row.setting.learning_rate, row.setting.weight) == best[row.entry.name]
        assert row.ap == pytest.approx([0.71, 0.72, 0.73])


def test_losses_that_are_not_tuned_are_trained_with_their_first_setting():
    question = next(question for question in QUESTIONS if not question.tuned)
    entry = next(entry for entry in question.entries if entry.grid[0] == (1.0, 8.0))
    tuning, setting = tune(question, entry, {})
    assert tuning == []
    assert (setting.learning_rate, setting.weight, setting.steps) == (1.0, 8.0, question.steps)


def test_the_final_runs_on_the_larger_data_set_have_more_steps():
    question = replace(QUESTIONS[0], data=("bccd", "deeppcb"), longer={"deeppcb": 2})
    finals = final_trials(question, FOCAL, tuning_trials(question, FOCAL)[0])
    steps = {(trial.data, trial.seed): trial.steps for trial in finals}
    assert steps == {
        (data, seed): question.steps * factor
        for data, factor in (("bccd", 1), ("deeppcb", 2))
        for seed in question.seeds
    }


def test_steps_that_are_asked_for_are_those_of_every_run():
    question = next(question for question in QUESTIONS if question.longer)
    for steps, seeds in ((8, ()), (8, (5,)), (0, (5,))):
        found = changed(question, steps, seeds)
        tuning = tuning_trials(found, FOCAL)
        trials = final_trials(found, FOCAL, tuning[0])
        assert {trial.seed for trial in trials} == set(seeds or question.seeds)
        asked = {steps} if steps else {question.steps, 2 * question.steps}
        assert {trial.steps for trial in tuning + trials} == asked


def test_tuning_goes_on_until_both_neighbours_of_the_best_are_worse():
    question = QUESTIONS[0]

    def ap(trial):  # highest at four times the weight; for the second loss at half the rate
        if trial.entry == question.entries[0]:
            return 1 - abs(np.log2(trial.weight) - 2) / 10 - abs(np.log2(trial.learning_rate)) / 5
        return 1 - abs(np.log2(trial.learning_rate) + 1) / 10 - abs(np.log2(trial.weight)) / 5

    results = results_of(question, ap)
    found = [tune(question, entry, results) for entry in question.entries[:2]]
    (weights, one), (rates, other) = found
    assert (one.learning_rate, one.weight) == (1, 4)
    assert [t.weight for t in weights] == [1, 1, 1, 0.5, 2, 4, 8]
    assert (other.learning_rate, other.weight) == (0.5, 1)
    assert [t.learning_rate for t in rates] == [1, 0.5, 2, 1, 1, 0.25]


def test_tuning_by_weight_goes_both_ways_and_ends_at_32_times_the_base_value():
    question = QUESTIONS[0]
    entry = next(entry for entry in question.entries if entry.name == "GHM-C, no floor")
    assert entry.grid == ((1, 8), (1, 16), (1, 4))
    for target, tried in ((1, [8, 16, 4, 2, 1, 0.5]), (1024, [8, 16, 4, 32])):
        results = results_of(
            replace(question, entries=(entry,)),
            lambda trial, target=target: 1 - abs(np.log2(trial.weight / target)) / 20,
        )
        trials, best = tune(question, entry, results)
        assert [trial.weight for trial in trials] == tried
        assert best.weight == min(target, 32)
        assert {trial.learning_rate for trial in trials} == {1}


def test_differences_are_taken_seed_by_seed():
    question = QUESTIONS[0]
    first, second = question.entries[:2]
    values = {first.name: {1: 0.1, 2: 0.5, 3: 0.3}, second.name: {1: 0.2, 2: 0.55, 3: 0.3}}

    def ap(trial):
        return values.get(trial.entry.name, {}).get(trial.seed, 0.0)

    results = results_of(question, ap)
    one, other, *_ = rows(question, results)
    assert paired_difference(other, one) == pytest.approx((0.05, 0.0, 0.1))
    text = scores_table([one, other])
    assert "| 0.350 (0.200 to 0.550) | +0.050 (+0.000 to +0.100) |" in text


def test_variants_take_the_setting_that_was_best_for_their_loss():
    question = next(question for question in QUESTIONS if question.key == "H2")

    def ap(trial):
        of_floor = trial.entry.name == "GHM-C, floor 100; smooth L1"
        best = (1.0, 0.5) if of_floor else (1.0, 2.0)
        return 0.5 + 0.2 * ((trial.learning_rate, trial.weight) == best)

    results = results_of(question, ap)
    found = {row.entry.name: row.setting for row in rows(question, results)}
    few = found["GHM-C, floor 100; smooth L1, 5 bins"]
    assert few.weight == 0.5
    assert found["GHM-C, no floor; smooth L1, 40 bins"].weight == 2.0


def test_variants_are_compared_with_their_loss_and_others_with_the_first():
    question = next(question for question in QUESTIONS if question.key == "H2")
    ap = {"GHM-C, no floor; smooth L1": 0.2, "GHM-C, no floor; smooth L1, 5 bins": 0.3}
    results = results_of(question, lambda trial: ap.get(trial.entry.name, 0.5))
    lines = {
        line.split(" | ")[1]: line for line in scores_table(rows(question, results)).split("\n")
    }
    assert lines["GHM-C, no floor; smooth L1, 5 bins"].endswith("| +0.100 |")
    assert lines["GHM-C, no floor; smooth L1"].endswith("| -0.300 |")
    assert lines["GHM-C, floor 100; smooth L1, 5 bins"].endswith("| +0.000 |")


def test_the_other_tables_have_a_line_per_loss():
    question = QUESTIONS[0]

    def ap(trial):  # weight x 2: 0.6 and the seeds 1, 2, 3
        return 0.4 + 0.1 * min(trial.weight, 4 - trial.weight) + 0.01 * trial.seed

    results = results_of(question, ap)
    found = rows(question, results)
    by_iou = next(line for line in iou_table(found).splitlines() if "| focal |" in line)
    assert by_iou.endswith("| x 2 | 0.670 | 0.570 | 0.470 | 0.370 | 0.270 | 0.720 |")
    error = next(line for line in calibration_table(found).splitlines() if "| focal |" in line)
    assert error.endswith("| 0.380 (0.370 to 0.390) |")
    head, _, *tuned = tuning_table(question, results).splitlines()
    weights = " | ".join(f"rate x 1, weight x {x:g}" for x in (0.5, 1, 2, 4, 8, 16))
    assert head == f"| loss | rate x 0.5, weight x 1 | {weights} | rate x 2, weight x 1 |"
    assert tuned[0] == "| focal | 0.500 | 0.450 | 0.500 | 0.600 | 0.400 |  |  | 0.500 |"
    assert len(tuned) == len(question.entries)
    *_, last = sensitivity_table(question, results).splitlines()
    assert last == "| GHM-C, published | 0.600 | 0.500 | 0.450 | 0.750 |"


def test_bins_of_score_are_pooled_over_the_seeds_by_their_counts():
    def run(*bins):
        keys = ("score", "precision", "count")
        return {"reliability": [dict(zip(keys, each, strict=True)) for each in bins]}

    empty = [(0.0, 0.0, 0)] * 8
    runs = (
        run((0.05, 0.1, 3000), (0.12, 0.5, 10), *empty),
        run((0.07, 0.4, 1000), (0.18, 0.0, 0), *empty),
    )
    entry = QUESTIONS[0].entries[0]
    (setting, *_) = tuning_trials(QUESTIONS[0], entry)
    row = Row(entry, "digit_scenes", setting, runs)
    assert pooled_bins(row)[:3] == [
        pytest.approx((0.055, 0.175, 4000)),
        pytest.approx((0.12, 0.5, 10)),
        (0.0, 0.0, 0),
    ]
    head, _, first, second, *_, last = bins_table([row]).splitlines()
    assert head == "| score | focal: precision | detections |"
    assert first == "| 0.0 to 0.1 | 0.175 | 4,000 |"
    assert second == "| 0.1 to 0.2 | 0.500 | 10 |"
    assert last.startswith("| 0.9 to 1.0 |")


def test_the_table_of_outliers_has_the_share_of_the_ap_that_is_left():
    question = next(question for question in QUESTIONS if question.key == "H5")

    def ap(trial):
        return (0.5 + 0.1 * trial.seed) * (1.0 if trial.data == "digit_scenes" else 0.8)

    found = rows(question, results_of(question, ap))
    spoilt = "missing_boxes_40"
    found = [row for row in found if row.data in ("digit_scenes", spoilt)]
    found = [
        row for row in found if (row.entry.name, row.data) != ("cross-entropy; smooth L1", spoilt)
    ]
    head, _, first, *_, cross, _ = outliers_table(found).splitlines()
    assert head == f"| loss | digit_scenes | {spoilt} | left with {spoilt} |"
    aps = "0.700 (0.600 to 0.800) | 0.560 (0.480 to 0.640)"
    assert first == f"| focal; smooth L1 | {aps} | 0.800 (0.800 to 0.800) |"
    assert cross == "| cross-entropy; smooth L1 | 0.700 (0.600 to 0.800) |  |  |"


def test_a_row_appears_when_all_its_runs_are_finished():
    question = QUESTIONS[0]
    results = results_of(question, lambda trial: 0.5)
    entry = question.entries[2]
    *_, last = final_trials(question, entry, tuning_trials(question, entry)[0])
    del results[last.key]
    names = [row.entry.name for row in rows(question, results)]
    assert names == [e.name for e in question.entries if e is not entry]


def test_a_line_that_a_crash_cut_off_is_no_result(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert read_results(path) == {}
    path.write_text('{"key": "a", "metrics": {"AP": 0.5}}\n{"key": "b", "metr')
    assert list(read_results(path)) == ["a"]
    add_line(path, '{"key": "c"}')
    assert list(read_results(path)) == ["a", "c"]


def test_a_free_core_takes_what_a_finished_run_makes_possible_and_no_run_twice(
    tmp_path, monkeypatch
):
    question = QUESTIONS[0]
    one, other, third = final_trials(question, FOCAL, tuning_trials(question, FOCAL)[0])
    started, ran = threading.Event(), []

    def run(self, trial):
        ran.append(trial)
        if trial is third:
            started.set()
        if trial is other:
            assert started.wait(10), "the third run waited for this one"
        return {"key": trial.key, "metrics": {"AP": 0.5}}

    monkeypatch.setattr(Study, "_run", run)
    study = Study(tmp_path / "runs.jsonl", "data", tmp_path, (0, 1))
    study.train(lambda: [one, one, other] + [third] * (one.key in study.finished))
    assert sorted(trial.seed for trial in ran) == [1, 2, 3]
    assert set(study.finished) == {one.key, other.key, third.key}
    study.train(lambda: [one, other, third])
    assert len(ran) == 3


def test_outliers_are_a_share_of_the_labels_and_change_nothing_else(rng):
    classes = [3, 5, 8]
    annotations = [
        {"id": i, "image_id": i % 7, "category_id": int(rng.choice(classes)), "bbox": [i, 0, 5, 5]}
        for i in range(200)
    ]
    truth = {"annotations": annotations, "categories": [{"id": c} for c in classes], "images": []}
    wrong = corrupted(truth, "wrong_labels", 0.2)["annotations"]
    changed = [a for a, b in zip(annotations, wrong, strict=True) if a != b]
    assert len(changed) == 40
    for before, after in zip(annotations, wrong, strict=True):
        assert after["category_id"] in classes
        assert {**after, "category_id": before["category_id"]} == before
    fewer = corrupted(truth, "missing_boxes", 0.4)["annotations"]
    assert len(fewer) == 120
    assert all(annotation in annotations for annotation in fewer)


def test_ap_at_an_iou_counts_the_detections_that_reach_it():
    truth = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600,
             "iscrowd": 0}
        ],
    }  # fmt: skip
    # IoU 32 / 40 = 0.8
    shifted = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 32], "score": 0.9}]
    found = ap_by_iou(truth, shifted)
    assert list(found) == [f"{0.5 + 0.05 * i:.2f}" for i in range(10)]
    reached = [float(iou) < 0.79 for iou in found]
    assert [value > 0.99 for value in found.values()][:6] == reached[:6]
    assert list(found.values())[7:] == [0.0] * 3


@pytest.mark.slow
def test_the_study_runs_by_its_command_and_trains_nothing_twice(tmp_path):
    results = tmp_path / "results" / "runs.jsonl"
    command = [sys.executable, "-m", "experiments.study", "--smoke", "--only", "H5"]
    command += ["--data-dir", str(tmp_path / "data"), "--results", str(results)]
    command += ["--runs", str(tmp_path / "runs")]

    def run():
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    output = run()
    lines = results.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    keys = [record["key"] for record in records]
    assert len(set(keys)) == len(keys)
    assert sum("seed 1" in key for key in keys) == 2  # one final run on each data set
    assert all("seed 0" in key for key in keys[:-2])  # tuning: the two settings, and further ones
    assert len(keys) >= 4
    assert sum("wrong_labels_10" in record["key"] for record in records) == 1
    assert "| wrong_labels_10 | focal; smooth L1 |" in output
    assert not list((tmp_path / "runs").iterdir())
    results.write_text("\n".join(lines[:-1]) + "\n")  # as if it had been stopped
    run()
    assert results.read_text().splitlines()[:-1] == lines[:-1]
    assert json.loads(results.read_text().splitlines()[-1])["metrics"] == records[-1]["metrics"]

"""A run's directory never overwrites anything."""

import dataclasses

import pytest

from ghm_jax.config import Config, Harmonizing, Loss, Predict, Run
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.directory import RunDirectory, claim_run, load_run
from ghm_jax.runs.experiments import experiment_name, load_experiment
from ghm_jax.runs.storage import set_aside, write_text


def refusal(function, *args):
    """The one line with which a call is refused."""
    with pytest.raises(ConfigError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_new_run_gets_its_directory_and_its_config(tmp_path):
    config = Config(seed=5, loss=Loss(ghm_c=Harmonizing(momentum=0.5)))
    run = claim_run(tmp_path / "runs" / "a", config)
    assert run == RunDirectory(tmp_path / "runs" / "a")
    assert load_run(run.path) == (run, config)
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


def test_an_empty_directory_may_be_used(tmp_path):
    assert claim_run(tmp_path, Config()).config.is_file()


def test_the_same_config_resumes_and_harmless_settings_may_change(tmp_path):
    claim_run(tmp_path, Config())
    later = Config(run=Run(workers=0, wrapper="shard_map"), predict=Predict(nms_iou=0.6))
    claim_run(tmp_path, later)
    assert load_run(tmp_path)[1] == later  # the newest settings apply


def test_another_config_is_refused_and_everything_that_differs_is_named(tmp_path):
    config = Config()
    claim_run(tmp_path, config)
    other = dataclasses.replace(config, seed=3, loss=Loss(ghm_c=Harmonizing(bins=20)))
    line = refusal(claim_run, tmp_path, other)
    for words in (str(tmp_path), "seed 0, not 3", "loss.ghm_c.bins", "`run_dir`", "`restart`"):
        assert words in line
    assert load_run(tmp_path)[1] == config


@pytest.mark.parametrize("kind", ["directory", "file", "below a file"])
def test_a_path_that_is_not_a_run_is_left_alone(tmp_path, kind):
    precious = tmp_path / "mine"
    if kind == "directory":
        precious.mkdir()
        (precious / "thesis.tex").write_text("years")
    else:
        precious.write_text("years")
    path = precious / "run" if kind == "below a file" else precious
    line = refusal(claim_run, path, Config())
    assert str(path) in line
    assert "`run_dir`" in line
    file = precious / "thesis.tex" if kind == "directory" else precious
    assert file.read_text() == "years"
    assert sum(1 for _ in tmp_path.rglob("*")) == (2 if kind == "directory" else 1)


def test_a_run_moved_aside_keeps_everything(tmp_path):
    run = claim_run(tmp_path / "run", Config())
    run.history.write_text("{}\n")
    new = set_aside(run.path)
    assert not run.path.exists()
    assert new.parent == tmp_path
    assert new.name.startswith("run-before-")
    assert {path.name for path in new.iterdir()} == {"config.json", "metrics.jsonl"}


def test_moving_aside_twice_in_a_second_loses_nothing(tmp_path):
    olds = set()
    for seed in range(3):
        claim_run(tmp_path / "run", Config(seed=seed))
        olds.add(set_aside(tmp_path / "run"))
    assert {load_run(old)[1].seed for old in olds} == {0, 1, 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not a run"),
        ("{", "config.json"),
        ('{"sed": 1}', "sed: no such setting"),
        ('{"seed": "one"}', "seed: 'one'"),
        ("[1]", "config.json"),
    ],
)
def test_a_directory_that_is_not_a_run_cannot_be_loaded(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    line = refusal(load_run, tmp_path)
    assert words in line
    assert str(tmp_path) in line


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    write_text(path, "old 猫")
    assert path.read_bytes() == "old 猫".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 9999 + "\ud800")  # cannot be encoded: fails within the writing
    assert path.read_text(encoding="utf-8") == "old 猫"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_experiment_is_the_config_of_its_file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text("from ghm_jax.config import Config\n\nconfig = Config(seed=11)\n")
    assert load_experiment(path) == load_experiment(str(path)) == Config(seed=11)


def test_a_file_may_hold_several_configs_by_name(tmp_path):
    path = tmp_path / "table.py"
    path.write_text(
        "from ghm_jax.config import Config\n\n"
        "configs = {f'seed_{i}': Config(seed=i) for i in (3, 4)}\n"
    )
    assert load_experiment(f"{path}:seed_4") == Config(seed=4)
    assert experiment_name(f"{path}:seed_4") == "table-seed_4"
    assert experiment_name(path) == "table"
    for given in (path, f"{path}:seed_5", f"{path}:"):
        line = refusal(load_experiment, given)
        assert f"choose from {path}:seed_3, {path}:seed_4" in line
    path.write_text("from ghm_jax.config import Config\n\nconfig = Config()\n")
    assert f"give {path}" in refusal(load_experiment, f"{path}:seed_3")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such experiment file"),
        ("", "defines no 'config"),
        ("config = {}", "defines no 'config"),
        ("config = Config()", "NameError"),
        ("raise ValueError('two\\nlines')", "ValueError: two"),
        ("config = (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit"),
    ],
)
def test_a_broken_experiment_is_one_line(tmp_path, content, words):
    path = tmp_path / "experiment.py"
    if content is not None:
        path.write_text(content)
    line = refusal(load_experiment, path)
    assert words in line
    assert str(path) in line

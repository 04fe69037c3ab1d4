"""A run's directory never overwrites anything."""

import contextlib
import dataclasses
import json
import os
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_jax.config import Config, Harmonizing, Loss, Predict, Run, to_dict
from ghm_jax.exceptions import ConfigError
from ghm_jax.runs.directory import RunDirectory, claim_run, load_run, note_dataset
from ghm_jax.runs.experiments import experiment_name, load_experiment
from ghm_jax.storage import cache_directory, set_aside, why_not_writable, write_text


def claim(path, config, **how):
    """The directory of a run that was claimed and given back."""
    with claim_run(path, config, **how) as run:
        return run


def refusal(function, *args):
    """The one line with which a call is refused."""
    with pytest.raises(ConfigError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_new_run_gets_its_directory_and_its_config(tmp_path):
    config = Config(seed=5, loss=Loss(ghm_c=Harmonizing(momentum=0.5)))
    run = claim(tmp_path / "runs" / "a", config)
    assert run == RunDirectory(tmp_path / "runs" / "a")
    assert load_run(run.path) == (run, config)
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


def test_an_empty_directory_may_be_used(tmp_path):
    assert claim(tmp_path, Config()).config.is_file()


def test_the_same_config_resumes_and_harmless_settings_may_change(tmp_path):
    claim(tmp_path, Config())
    later = Config(run=Run(workers=0, wrapper="shard_map"), predict=Predict(nms_iou=0.6))
    claim(tmp_path, later)
    assert load_run(tmp_path)[1] == later  # the newest settings apply


def test_another_config_is_refused_and_everything_that_differs_is_named(tmp_path):
    config = Config()
    claim(tmp_path, config)
    other = dataclasses.replace(config, seed=3, loss=Loss(ghm_c=Harmonizing(bins=20)))
    line = refusal(claim, tmp_path, other)
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
    line = refusal(claim, path, Config())
    assert str(path) in line
    assert "`run_dir`" in line
    file = precious / "thesis.tex" if kind == "directory" else precious
    assert file.read_text() == "years"
    assert sum(1 for _ in tmp_path.rglob("*")) == (2 if kind == "directory" else 1)


def test_a_run_moved_aside_keeps_everything(tmp_path):
    run = claim(tmp_path / "run", Config())
    run.history.write_text("{}\n")
    new = set_aside(run.path)
    assert not run.path.exists()
    assert new.parent == tmp_path
    assert new.name.startswith("run-before-")
    assert {path.name for path in new.iterdir()} == {"config.json", "metrics.jsonl"}


def test_moving_aside_twice_in_a_second_loses_nothing(tmp_path):
    olds = set()
    for seed in range(3):
        claim(tmp_path / "run", Config(seed=seed))
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
        ("[" * 10**5, "is nested too deeply"),
        ('{"seed": ' + "1" * 5000 + "}", "an integer has thousands of digits"),
        ('{"anchors": {"negative_iou": 1' + "0" * 400 + "}}", "negative_iou"),
        ('{"data": {"dir": "\\ud800"}}', "data.dir"),
    ],
)
def test_a_directory_that_is_not_a_run_cannot_be_loaded(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    line = refusal(load_run, tmp_path)
    assert words in line
    assert str(tmp_path) in line


def not_a_config(draw, whole):
    """A text like that of a good config.json, with one value changed, or cut off."""
    section = draw(st.sampled_from(sorted(whole)))
    place = whole
    if isinstance(whole[section], dict):
        place, section = whole[section], draw(st.sampled_from(sorted(whole[section])))
    odd = st.sampled_from([None, True, "", "nan", "\ud800", "\0", "a\nb", "x" * 500, -1, 0, 2])
    odd |= st.sampled_from([2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf")])
    values = st.recursive(
        odd,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=5,
    )
    match draw(st.sampled_from(["value", "key", "double", "missing", "cut", "bytes"])):
        case "key":
            place[draw(st.text(max_size=4) | st.sampled_from(["x" * 999, "bins"]))] = place[section]
        case "double":
            return (json.dumps(whole)[:-1] + f', "seed": {json.dumps(draw(odd))}}}').encode()
        case "value":
            place[section] = draw(values)
        case "missing":
            del place[section]
        case "cut":
            text = json.dumps(whole)
            return text[: draw(st.integers(0, len(text)))].encode()
        case "bytes":
            return draw(st.binary(max_size=40))
    return json.dumps(whole).encode()


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "200")), deadline=None)
@given(st.data())
def test_a_config_of_any_content_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any_config"
    path.mkdir(exist_ok=True)
    content = not_a_config(data.draw, json.loads(json.dumps(to_dict(Config(seed=3)))))
    (path / "config.json").write_bytes(content)
    config, line = None, ""
    try:
        _, config = load_run(path)
    except ConfigError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 400 + len(str(path))
    if config is None:
        return
    assert to_dict(config).keys() == to_dict(Config()).keys()
    values = json.loads(content)  # what was read is what is there
    assert config.seed == values.get("seed", 0)
    with contextlib.suppress(ConfigError):
        config.check()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
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
    for wrong in (path, f"{path}:seed_5", f"{path}:"):
        line = refusal(load_experiment, wrong)
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
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise GeneratorExit", "GeneratorExit; fix"),
        ("class Stop(BaseException): pass\nraise Stop('now')", "Stop: now"),
        ("raise ValueError('\\n\\nthe second')", "ValueError: the second"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("configs = {}", "holds several configs; give some a name"),
        ("configs = {'a\\nb': 1, 'c': 2}", ".py:c"),
        ("class Odd(dict):\n def __iter__(self): 1 / 0\nconfigs = Odd(a=1)", "ZeroDivision"),
        ("class Odd:\n __class__ = property(lambda self: 1 / 0)\nconfig = Odd()", "ZeroDivision"),
    ],
)
def test_a_broken_experiment_is_one_line(tmp_path, content, words):
    path = tmp_path / "experiment.py"
    if content is not None:
        path.write_text(content)
    line = refusal(load_experiment, path)
    assert words in line
    assert str(path) in line


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\udc80", "", ".", "a\nb", "loop/a"])
def test_a_name_that_is_no_experiment_file_is_one_line(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "no such experiment file" in refusal(load_experiment, tmp_path / name)
    assert "no such experiment file" in refusal(load_experiment, f"{tmp_path / name}.py:row")


EXPERIMENT = """# An experiment, größer.
from ghm_jax.config import Config, Data, Harmonizing, Loss

bins = [10 * i for i in range(1, 4)]
config = Config(
    seed=11,
    data=Data(name="mine", short_side=64, long_side=64, buckets=((64, 64),)),
    loss=Loss(weight=0.5, ghm_c=Harmonizing(bins=bins[1])),
)
configs = {f"bins_{n}": Config(loss=Loss(ghm_c=Harmonizing(bins=n))) for n in bins}
"""
VALUES = st.sampled_from(
    ["None", "True", "-1", "0", "2**40", "10**5000", "0.5", "1e999", "()", "[]", "[[1]]", "{}",
     "{1}", "'x'", "'\\ud800'", "'\\0'", "b'x'", "...", "1j", "(", "Config", "Config()", "Data()",
     "Loss()", "bins", "iter(bins)", "1/0", "exit()", "exit('a\\nb')", "int('x')", "nosuch"]
)  # fmt: skip
STATEMENTS = st.sampled_from(
    ["raise SystemExit", "raise MemoryError", "raise BaseException('a\\nb')", "import nosuch",
     "del config", "f = lambda: f(); f()", "config = configs", "configs = list(configs)",
     "assert 0", "  x = 1", "\0", "return", "object.__setattr__(config, 'seed', None)",
     "class config(Config): pass", "configs[1] = configs"]
)  # fmt: skip


@st.composite
def changed_experiment(draw) -> bytes:
    """A good experiment file with changes."""
    text = EXPERIMENT
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            old = draw(
                st.sampled_from(re.findall(r"(?<==)[^=\n(){}]+(?=[,)])|bins\[1\]|10 ", text))
            )
            text = text.replace(old, draw(VALUES), 1)
        else:
            lines = text.splitlines()
            place = draw(st.integers(0, len(lines)))
            lines[place : place + draw(st.integers(0, 1))] = [draw(STATEMENTS)]
            text = "\n".join(lines)
    whole = text.encode(draw(st.sampled_from(["utf-8"] * 8 + ["latin-1", "utf-16", "utf-8-sig"])))
    if draw(st.integers(0, 3)):
        return whole
    place = draw(st.integers(0, len(whole)))
    return whole[:place] + draw(st.binary(max_size=3)) + whole[place + draw(st.integers(0, 99)) :]


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "150")), deadline=None)
@given(content=changed_experiment(), row=st.sampled_from(["", "", ":bins_10", ":nosuch"]))
def test_a_changed_experiment_is_what_python_says_it_is_or_one_line(tmp_path_factory, content, row):
    path = tmp_path_factory.getbasetemp() / "changed.py"
    path.write_bytes(content)
    found, line, before = None, "", list(sys.path)
    try:
        found = load_experiment(f"{path}{row}")
    except ConfigError as error:
        line = str(error)
    assert len(line.splitlines()) == (found is None)
    assert len(line) < 700 + len(str(path))
    assert sys.path == before
    if found is not None:
        space = {}
        exec(compile(content, "changed.py", "exec"), space)
        expected = space["configs"][row[1:]] if row else space["config"]
        same = [json.dumps(dataclasses.asdict(config)) for config in (found, expected)]
        assert json.loads(same[0]) == json.loads(same[1])  # lists are tuples, 1 is 1.0
        with contextlib.suppress(ConfigError):
            found.check()


def test_an_experiment_may_import_files_of_its_folder(tmp_path, monkeypatch):
    """Each finds its own, also where two folders have one of the same name."""
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("a", 3), ("b", 4)):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "common.py").write_text("from parts.number import seed\n")
        (tmp_path / folder / "parts" / "number.py").write_text(f"seed = {seed}\n")
        (tmp_path / folder / "run.py").write_text(
            "from common import seed\nfrom ghm_jax.config import Config\n\n"
            "config = Config(seed=seed)\n"
        )
    path, modules = list(sys.path), set(sys.modules)
    assert load_experiment("a/run.py").seed == 3
    assert load_experiment("b/run.py").seed == 4
    assert sys.path == path
    assert not {"common", "parts", "parts.number"} & (set(sys.modules) - modules)


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b", "**", "what?", "back\\slash", "gs:", "a\udcff"])
def test_a_path_whose_checkpoints_could_not_be_read_back_is_refused(tmp_path, name):
    line = refusal(claim, tmp_path / name / "run", Config())
    assert "could not be read back" in line
    assert "`run_dir`" in line
    assert not list(tmp_path.iterdir())


def test_a_restart_leaves_a_run_alone_that_cannot_be_claimed_again(tmp_path):
    claim(tmp_path / "run", Config())
    (tmp_path / "run").rename(tmp_path / "run[1]")
    refusal(lambda: claim(tmp_path / "run[1]", Config(), restart=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run[1]"]


def test_a_restart_moves_the_old_run_aside_and_says_where(tmp_path):
    claim(tmp_path / "run", Config(seed=1))
    said = []
    claim(tmp_path / "run", Config(seed=2), restart=True, say=said.append)
    (old,) = (path for path in tmp_path.iterdir() if path.name != "run")
    assert said == [f"moved the old run to {old}"]
    assert [path.name for path in old.iterdir()] == ["config.json"]
    assert load_run(tmp_path / "run")[1].seed == 2


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    assert "cannot be written" in refusal(claim, tmp_path / ("x" * 300), Config())


def test_the_data_of_a_run_may_be_somewhere_else(tmp_path):
    claim(tmp_path, Config(seed=1))
    assert load_run(tmp_path)[1].data.dir == "data"
    moved = load_run(tmp_path, data_dir="elsewhere")[1]
    assert moved == dataclasses.replace(
        Config(seed=1), data=dataclasses.replace(Config().data, dir="elsewhere")
    )


def test_another_data_set_under_the_same_name_is_said_once(tmp_path):
    run = RunDirectory(tmp_path)
    assert note_dataset(run, 10, "a") == ""
    assert note_dataset(run, 10, "a") == ""
    warning = note_dataset(run, 12, "b")
    assert "prepared again" in warning
    assert "10 images then, 12 now" in warning
    assert "\n" not in warning
    assert note_dataset(run, 12, "b") == ""
    run.dataset.write_text("[")
    assert note_dataset(run, 10, "a") == ""


def test_files_that_cannot_be_written_are_known_before(tmp_path):
    for good in (tmp_path / "new.json", tmp_path / "no" / "such" / "folder.json"):
        assert why_not_writable(good) == ""
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "other.json.part").mkdir()
    (tmp_path / "file").write_text("mine")
    for bad, words in (
        (tmp_path / "folder.json", "folder.json is a directory"),
        (tmp_path / "other.json", "other.json.part is a directory"),
        (tmp_path / "file" / "x.json", "Not a directory"),
    ):
        assert words in why_not_writable(tmp_path / "new.json", bad)


def test_without_a_home_nothing_is_cached(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GHM_JAX_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert cache_directory("programs") is None
    monkeypatch.setenv("GHM_JAX_CACHE", "here")
    assert str(cache_directory("programs")) == "here/programs"

"""The command line: success prints what to do next, a user error is one line."""

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from ghm_jax.cli import main
from ghm_jax.cli.arguments import Arguments, parse
from ghm_jax.cli.import_weights import Import
from ghm_jax.cli.messages import one_line
from ghm_jax.cli.train import Train
from ghm_jax.config import Config, Model, flatten
from ghm_jax.data import prepare_folder
from ghm_jax.exceptions import ArgumentError, ConfigError

pytestmark = pytest.mark.usefixtures("quick_compilation")

COMMANDS = (
    *("train", "evaluate", "predict", "import", "export", "describe", "stats", "doctor"),
    *("data prepare folder", "data prepare coco/2017", "data inspect"),
    *("bench losses", "bench data", "bench train", "bench inference"),
)
IMPORTS = "from ghm_jax.config import *\n\nconfig = "


@pytest.fixture
def place(tmp_path, dataset_dir, monkeypatch):
    """A working directory with one experiment, `tiny.py`."""
    (tmp_path / "tiny.py").write_text(IMPORTS + repr(tiny_config(dataset_dir)) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_dir(place, finished_run):
    """A copy of the finished run in that directory."""
    shutil.copytree(finished_run[0].path, place / "run")
    return "run"


def files(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}, sorted(
        place.rglob("*")
    )


def fails(capsys, *args):
    """The one line that the command leaves on stderr."""
    with pytest.raises(SystemExit) as exit_:
        main(args)
    out, err = capsys.readouterr()
    assert exit_.value.code == 1
    assert out == ""
    assert err.startswith("ghm-jax: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert "\x1b" not in err  # no colours in a file
    return err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        # what was typed, what the line must hold: the key, what is wrong, the remedy
        ("trian tiny.py", ["unknown command", "trian", "train, evaluate"]),
        ("trian --help", ["unknown command", "trian", "train, evaluate"]),
        ("train", ["usage: ghm-jax train EXPERIMENT"]),
        ("train --loss.ghm-c.momentum 0.9 tiny.py", ["usage: ghm-jax train EXPERIMENT"]),
        ("train nosuch.py", ["nosuch.py", "no such experiment", "experiments/"]),
        ("train tiny.py:ten", ["tiny.py:ten", "no 'configs' to choose", "give tiny.py"]),
        ("train table.py", ["several configs", "choose from table.py:one"]),
        ("describe table.py:two", ["table.py:two", "no row 'two'", "choose from table.py:one"]),
        ("train tiny.py --optimizer.momentun 0.9", ["did you mean optimizer.momentum"]),
        ("train tiny.py --momentum 0.9", ["momentum", "did you mean", "loss.ghm_c.momentum"]),
        ("train tiny.py --loss.min-count 9", ["loss.min_count", "did you mean loss.ghm_c.min_"]),
        ("train tiny.py --loss.box-bins 9", ["loss.box_bins", "did you mean loss.ghm_r.bins?"]),
        ("train tiny.py --loss.density exact", ["did you mean loss.ghm_c.density or loss.ghm_r"]),
        ("train tiny.py --loss.preset reference", ["loss.preset", "bias_correction", "loss.ghm_c"]),
        ("train tiny.py --nosuch 0.9", ["nosuch", "--help"]),
        ("train tiny.py --loss.ghm-c.bins ten", ["loss.ghm-c.bins", "ten", "int", "--help"]),
        ("train tiny.py --loss.ghm-c.bins", ["loss.ghm-c.bins", "--help"]),
        ("train tiny.py --loss.ghm-c.bins 0", ["loss.ghm_c.bins: must be positive, got 0"]),
        ("train tiny.py --loss.classification ghmc", ["loss.classification", "ghm_c"]),
        ("train tiny.py --loss.classification none_such:f", ["none_such:f", "PYTHONPATH"]),
        ("train tiny.py --loss.box ghm_jax.losses:none", ["ghm_jax.losses:none", "imported"]),
        ("train tiny.py --model.norm grup", ["model.norm", "group"]),
        ("train tiny.py --model.backbone resnet81", ["model.backbone", "did you mean resnet18"]),
        ("train tiny.py --data.dir gone", ["data.dir", "'squares'", "data prepare"]),
        ("train tiny.py --data.name rounds", ["data.dir", "'rounds'", "data prepare"]),
        ("train tiny.py --data.train-split test", ["data.train_split", "train, validation"]),
        ("train tiny.py --optimizer.batch-size 3", ["optimizer.batch_size: 3", "multiple of 2"]),
        ("train tiny.py --data.buckets 65 64", ["data.buckets", "multiples of 32"]),
        ("train tiny.py --data.min-short-side 65", ["data.min_short_side", "short_side 64", "65"]),
        ("train tiny.py --data.buckets 64 64 64 64", ["data.buckets", "twice"]),
        ("train tiny.py --data.buckets 32 64", ["data.buckets", "an image needs 64x", "larger"]),
        ("train tiny.py --data.zoom 2 1", ["data.zoom", "range", "(2.0, 1.0)"]),
        ("train tiny.py --run-dir taken", ["taken", "not a run", "--run-dir"]),
        ("train tiny.py --run-dir tiny.py/run", ["tiny.py/run", "cannot be written", "--run-dir"]),
        ("train tiny.py --run-dir run --loss.ghm-c.bins 7", ["ghm_c.bins 10, not 7", "--restart"]),
        ("train tiny.py --model.remat maybe", ["model.remat", "maybe"]),
        ("import w.pth tiny.py --model.remat maybe", ["model.remat", "maybe"]),
        ("train tiny.py --run.no-workers", ["run.no_workers", "no such setting"]),
        ("train -v tiny.py", ["usage: ghm-jax train EXPERIMENT"]),
        ("stats", ["usage: ghm-jax stats RUN"]),
        ("stats nosuch", ["nosuch", "not a run"]),
        ("stats run --images 0", ["--images", "positive"]),
        ("stats run --split test", ["data.validation_split", "train, validation"]),
        ("stats run --out tiny.py", ["--out", "tiny.py", "directory"]),
        ("doctor --images 0", ["--images", "positive"]),
        ("doctor --data.dri data", ["data.dri", "data.dir"]),
        ("bench train --size 65 64", ["(65, 64)", "multiples of 32"]),
        ("bench train --backbones resnet81", ["resnet81", "did you mean resnet18"]),
        ("bench train --parts speed", ["parts", "networks"]),
        ("bench train --devices 0", ["--devices", "positive"]),
        ("train tiny.py --distributed.process-id 1", ["--distributed.coordinator", "0 to N - 1"]),
        ("train tiny.py --distributed.proces-id 1", ["distributed.proces_id", "no such setting"]),
        ("bench inference --repeats 0", ["--repeats", "positive"]),
        ("bench inference --size 65 64", ["(65, 64)", "multiples of 32"]),
        ("bench inference --backbone resnet81", ["resnet81", "did you mean resnet18"]),
        ("describe", ["usage: ghm-jax describe EXPERIMENT"]),
        ("describe nosuch.py", ["nosuch.py", "no such experiment"]),
        ("describe tiny.py --data.dir gone", ["--classes", "squares", "gone", "--data.dir"]),
        ("describe tiny.py --size 0 64", ["--size", "positive"]),
        ("describe tiny.py --loss.ghm-c.bins 0", ["loss.ghm_c.bins: must be positive"]),
        ("evaluate", ["usage: ghm-jax evaluate RUN"]),
        ("evaluate taken", ["taken", "not a run"]),
        ("evaluate nosuch", ["nosuch", "not a run"]),
        ("evaluate run --split test", ["data.validation_split", "train, validation"]),
        ("evaluate run --evaluator coco", ["evaluator", "hotcoco", "pycocotools"]),
        ("evaluate run --annotations gone.json", ["data.annotations", "no file gone.json"]),
        ("evaluate run --detections gone.json", ["gone.json", "no such file", "COCO results"]),
        ("evaluate run --detections tiny.py", ["tiny.py", "is not JSON"]),
        ("evaluate taken --detections gone.json", ["taken", "not a run"]),
        ("evaluate nosuch.py --detections gone.json", ["nosuch.py", "no such experiment"]),
        ("evaluate table.py --detections gone.json", ["table.py:one"]),
        ("evaluate table.py:two --detections gone.json", ["no row 'two'", "table.py:one"]),
        ("evaluate tiny.py --detections gone.json --out taken", ["--out", "taken", "not empty"]),
        ("evaluate run --out found", ["--out", "--detections"]),
        ("predict", ["usage: ghm-jax predict RUN IMAGE... --out DIR"]),
        ("predict run tiny.py", ["--out", "--help"]),
        ("predict nosuch tiny.py --out found", ["nosuch", "not a run"]),
        ("predict run gone.jpg --out found", ["gone.jpg", "no such file", "glob"]),
        ("predict run taken --out found", ["taken", "no image", ".jpg"]),
        ("predict run tiny.py --out taken", ["--out", "taken", "not empty"]),
        ("predict run tiny.py --out found --threshold 2", ["--threshold", "[0, 1]"]),
        ("train tiny.py --model.weights w.pth", ["model.weights", "model.norm 'group'"]),
        ("import", ["usage: ghm-jax import WEIGHTS EXPERIMENT"]),
        ("import w.pth", ["usage: ghm-jax import WEIGHTS EXPERIMENT"]),
        ("import w.pth nosuch.py", ["nosuch.py", "no such experiment"]),
        ("import w.safetensors tiny.py", ["w.safetensors", "no such file", "hf://OWNER/NAME"]),
        ("import tiny.py tiny.py", ["tiny.py", "not one of .safetensors, .pth"]),
        ("import w.pth tiny.py --data.dir gone", ["data.dir", "'squares'"]),
        ("import w.pth tiny.py --run-dir run", ["run: already holds a checkpoint", "--run-dir"]),
        ("export", ["usage: ghm-jax export RUN --out FILE"]),
        ("export run", ["--out", "--help"]),
        ("export nosuch --out w.safetensors", ["nosuch", "not a run"]),
        ("export run --out w.onnx", ["--out", "w.onnx", ".safetensors", ".stablehlo"]),
        ("export run --out w.stablehlo --size 65 64", ["--size", "(65, 64)", "multiples of 32"]),
        ("export run --out w.stablehlo --platforms gpu", ["platforms", "cpu", "cuda", "tpu"]),
        ("export run --out w.safetensors --batch-size 2", ["--batch-size", "weights only"]),
        ("export run --out no/w.safetensors", ["--out", "no directory no"]),
        ("export run --out w.safetensors", ["run: cannot be exported", "GroupNorm", ".stablehlo"]),
        ("data prepare", ["unknown command", "data prepare folder"]),
        ("data prepare coco/2017 --source taken", ["--source", "train2017", "unpack"]),
        ("data prepare folder --name mine", ["--train", "IMAGES_DIR ANNOTATIONS.json"]),
        ("data prepare coco/2017 --source taken --subset 5", ["--subset", "'5'", "like 1%"]),
        ("data prepare coco/2017 --source taken --splits val", ["--splits", "val", "validation"]),
        ("data prepare coco/2017 --source gs://b --splits train", ["--source", "gs://b", "mount"]),
        ("bench data --repeats 0", ["--repeats: must be positive"]),
        ("train tiny.py --optimizer.steps 99999999999999999999", ["optimizer.steps", "32 bits"]),
        ("train tiny.py --seed 1e400", ["--seed", "1e400", "--help"]),
        pytest.param(f"train tiny.py --seed {'1' * 600}", ["seed", "32 bits"], id="long seed"),
        ("train tiny.py --anchors.negative-iou 1e400", ["anchors.negative_iou", "finite"]),
        ("describe tiny.py --size 99999999999 64", ["--size", "2**31"]),
        ("data inspect", ["usage: ghm-jax data inspect EXPERIMENT"]),
        ("data inspect nosuch.py", ["nosuch.py", "no such experiment"]),
        ("data inspect tiny.py --batches 0", ["--batches: must be positive"]),
        ("data inspect tiny.py --data.dir gone", ["data.dir", "'squares'", "data prepare"]),
        ("data inspect tiny.py --out tiny.py", ["--out: tiny.py is a file"]),
        ("data prepare folder --name mine --train taken gone.json", ["train", "gone.json"]),
        ("train tiny.py --run-dir lr[0.1]", ["lr[0.1]", "could not be read back", "--run-dir"]),
        ("train tiny.py --run-dir s3://b/run", ["s3://b/run", "mount", "gs://BUCKET/DIR"]),
        ("train tiny.py --run-dir gs:/b/run", ["gs:/b/run", "mount", "--run-dir"]),
        (
            "train tiny.py --data.dir gs://b/data",
            ["gs://b/data", "name of a bucket", "gs://BUCKET/DIR"],
        ),
        ("evaluate s3://b/run", ["s3://b/run", "mount"]),
        ("evaluate run --data.dir gone", ["data.dir", "'squares' in gone", "--data.dir"]),
        ("stats run --data.dir gone", ["data.dir", "'squares' in gone", "--data.dir"]),
        ("evaluate tiny.py --detections d.json --data.dir gone", ["'squares' in gone"]),
        ("evaluate run --data.name other", ["--help"]),
        ("export run --out taken.stablehlo", ["--out", "taken.stablehlo is a directory"]),
        ("stats run --out tiny.py/stats", ["--out", "tiny.py", "Not a directory"]),
        ("predict run tiny.py --out tiny.py/found", ["--out", "tiny.py", "Not a directory"]),
        ("evaluate tiny.py --detections d.json --out tiny.py/x", ["--out", "Not a directory"]),
        ("bench losses --out no/losses.json", ["--out", "no directory no"]),
        ("bench data --out taken", ["--out", "taken is a directory"]),
    ],
)
def test_a_user_error_is_one_line_and_changes_no_file(place, run_dir, capsys, command, words):
    (place / "taken").mkdir()
    (place / "taken" / "precious.txt").write_text("mine")
    (place / "taken.stablehlo").mkdir()
    (place / "table.py").write_text("from ghm_jax.config import *\n\nconfigs = {'one': Config()}\n")
    before = files(place)
    line = fails(capsys, *command.split())
    for word in words:
        assert word in line
    assert files(place) == before
    # Whatever option the line names, the command has it.
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", line)) - {"--help", *command.split()}
    if named and not line.startswith("ghm-jax: usage"):
        with contextlib.suppress(SystemExit):
            main([*command.split()[: command_words(command)], "--help"])
        known = re.findall(r"--[a-z][a-z.-]*[a-z]", capsys.readouterr().out)
        assert named <= {*known, *(option.partition(".")[0] for option in known)}


@pytest.mark.parametrize("digit", ["1", "x"])
def test_the_line_about_a_value_of_any_length_is_short(place, capsys, digit):
    line = fails(capsys, "train", "tiny.py", "--seed", digit * 5000)
    assert "--seed" in line
    assert "--help" in line
    assert len(line) < 600


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--loss.weight", ["FLOAT|{published}", "['much']"]),
        ("--loss.mu", ["could not convert string to float: 'much'"]),
    ],
)
def test_a_value_of_the_wrong_type_is_what_tyro_says_without_its_box(
    place, encoding, option, words
):
    """Where the output cannot hold the characters of a box, tyro draws it with hyphens."""
    command = [sys.executable, "-c", "from ghm_jax.cli import main; main()"]
    done = subprocess.run(
        [*command, "train", "tiny.py", option, "much"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    line = done.stderr
    assert line.startswith(f"ghm-jax: Error parsing {option}: ")
    assert line.endswith(" (--help lists all settings)\n")
    assert line.count("\n") == 1
    assert all(word in line for word in words)
    for word in ("---", "helptext", "typing", "lambda", "Weight of"):
        assert word not in line


def command_words(command):
    """Words of a command's name: `data prepare folder`."""
    return next(n for n in (3, 2, 1, 0) if " ".join(command.split()[:n]) in COMMANDS or not n)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("config = 1", ["defines no 'config = Config(...)'"]),
        ("", ["defines no 'config = Config(...)'"]),
        ("config = Config(", ["SyntaxError"]),
        ("import nosuchmodule", ["ModuleNotFoundError", "nosuchmodule"]),
        ("from ghm_jax.config import *\nconfig = Config(sed=1)", ["TypeError", "sed"]),
    ],
)
def test_a_broken_experiment_is_one_line_with_its_name(place, capsys, code, words):
    (place / "broken.py").write_text(code)
    line = fails(capsys, "train", "broken.py")
    for word in ("broken.py", *words):
        assert word in line


def test_an_image_that_cannot_be_decoded_is_one_line_with_its_name(place, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (place / "cut.png").write_bytes(cv2.imencode(".png", noise)[1].tobytes()[:2000])
    box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [8, 8, 20, 20], "area": 400}
    annotations = {
        "images": [{"id": 7, "file_name": "cut.png", "width": 64, "height": 64}],
        "annotations": [{**box, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "noise"}],
    }
    (place / "cut.json").write_text(json.dumps(annotations))
    prepare_folder("cut", place / "cut", {"train": (place, place / "cut.json")})
    command = "data inspect tiny.py --data.dir cut --data.name cut"
    line = fails(capsys, *command.split())
    for word in ("image 7 (cut.png): cannot decode", "replace it", "skip"):
        assert word in line


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["ghm-jax train", "ghm-jax evaluate", "data prepare folder"]),
        ("--help", ["ghm-jax train", "ghm-jax evaluate", "data prepare folder"]),
        ("train --help", ["EXPERIMENT", "--run-dir", "--restart", "--loss.ghm-c.momentum"]),
        ("train tiny.py --help", ["--loss.ghm-r.momentum", "--optimizer.batch-size", "squares"]),
        ("describe --help", ["EXPERIMENT", "--size", "--classes", "--model.backbone"]),
        ("evaluate --help", ["RUN", "--split", "--evaluator", "pycocotools", "--data.dir"]),
        ("predict --help", ["RUN", "IMAGE", "--out", "--threshold", "--data.dir"]),
        ("doctor --help", ["RUN_OR_EXPERIMENT", "--images", "--data.dir"]),
        ("stats --help", ["RUN", "--out", "--split", "--images", "--data.dir"]),
        ("import --help", ["WEIGHTS", "EXPERIMENT", "--run-dir", "--model.dtype"]),
        ("export --help", ["RUN", "--out", ".safetensors", ".stablehlo", "--size", "--data.dir"]),
        ("data --help", ["data prepare folder"]),
        ("data inspect --help", ["EXPERIMENT", "--out", "--batches", "--data.short-side"]),
        ("data prepare --help", ["data prepare folder"]),
        ("data prepare folder --help", ["--train", "--validation", "--out"]),
        (
            "data prepare coco/2017 --help",
            ["--source", "--subset", "--splits", "test_dev"],
        ),
    ],
)
def test_every_level_has_help(place, capsys, command, words):
    with contextlib.suppress(SystemExit):
        main(command.split())
    out, err = capsys.readouterr()
    assert err == ""
    for word in words:
        assert word in out


def test_evaluation_prints_the_twelve_figures_and_where_the_report_is(run_dir, capsys):
    main(["evaluate", run_dir, "--evaluator", "pycocotools"])
    out, _ = capsys.readouterr()
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"):
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [name])
        figure = line.split()[1]
        assert figure == "-" or 0 <= float(figure) <= 100
    for name in ("ARs", "ARm", "ARl"):
        assert f"  {name} " in out
    assert "report: run/report.html" in out
    by_class = out.partition("by class (AP):\n")[2].splitlines()
    assert [line.split()[1] for line in by_class[:3]] == ["dark", "light", "absent"]
    assert by_class[2].split()[0] == "-"

    main(["evaluate", "tiny.py", "--detections", f"{run_dir}/detections.json"])
    again, _ = capsys.readouterr()
    assert again in out  # the same lines, without where the report is


def test_a_run_and_its_data_may_be_moved(run_dir, place, dataset_dir, capsys):
    config = json.loads((place / run_dir / "config.json").read_text())
    config["data"]["dir"] = "gone"
    (place / run_dir / "config.json").write_text(json.dumps(config))
    assert "--data.dir" in fails(capsys, "evaluate", run_dir)
    moved = ["--data.dir", str(dataset_dir)]
    main(["evaluate", run_dir, *moved])
    main(["stats", run_dir, "--images", "4", *moved])
    main(["export", run_dir, "--out", "d.stablehlo", "--platforms", "cpu", *moved])
    capsys.readouterr()
    assert json.loads((place / "d.stablehlo.json").read_text())["category_ids"] == [2, 5, 9]
    images = str(next(dataset_dir.parent.glob("train0.png")))
    main(["predict", run_dir, images, "--out", "found", *moved])
    assert "derived from class names" not in capsys.readouterr().out
    assert json.loads((place / run_dir / "config.json").read_text()) == config


def test_figures_are_printed_where_they_cannot_be_written(run_dir, place, capsys):
    (place / run_dir / "detections.json.part").mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", run_dir])
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    before, _, after = out.partition("evaluating step 6")
    assert "cannot be written (run/detections.json.part is a directory)" in before
    assert "  AP50 " in after
    assert "report" not in after
    (line,) = [line for line in err.splitlines() if line.startswith("ghm-jax: ")]
    assert "run/detections.json.part" in line


def test_a_file_system_that_cannot_be_written_is_one_line(place, run_dir, monkeypatch, capsys):
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system", "found")

    monkeypatch.setattr("ghm_jax.predict.predict", read_only)
    assert "Read-only file system: 'found'" in fails(capsys, "predict", run_dir, "x", "--out", "f")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_terminal_lacks_are_replaced(place, encoding):
    categories = [{"id": 1, "name": "été"}, {"id": 2, "name": "猫"}]
    image = np.full((64, 64, 3), 90, np.uint8)
    (place / "x.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    box = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [8, 8, 20, 20], "area": 400}
    truth = {
        "images": [{"id": 7, "file_name": "x.png", "width": 64, "height": 64}],
        "annotations": [{**box, "iscrowd": 0}],
        "categories": categories,
    }
    (place / "x.json").write_text(json.dumps(truth))
    prepare_folder("squares", place / "data", {"validation": (place, place / "x.json")})
    (place / "found.json").write_text(json.dumps([{**box, "score": 0.9}]))
    command = ["evaluate", "tiny.py", "--detections", "found.json", "--data.dir", "data"]
    done = subprocess.run(
        [sys.executable, "-c", f"from ghm_jax.cli import main; main({command!r})"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [line.split()[1] for line in done.stdout.splitlines()[13:15]]
    known = "été" if encoding == "latin-1" else "?t?"
    assert names == [known.encode(encoding), b"?"]


def test_an_error_stands_alone_on_its_line_after_a_bar(place, capsys):
    for name in ("a.png", "b.png"):
        noise = np.full((64, 64, 3), 90, np.uint8)
        (place / name).write_bytes(cv2.imencode(".png", noise)[1].tobytes())
    truth = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 64, "height": 64},
            {"id": 2, "file_name": "b.png", "width": 64, "height": 32},
        ],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}],
    }
    (place / "x.json").write_text(json.dumps(truth))
    with pytest.raises(SystemExit):
        main(["data", "prepare", "folder", "--name", "x", "--train", ".", "x.json"])
    gc.collect()
    lines = capsys.readouterr().err.splitlines()
    assert "check train 1/2" in "".join(lines[:-1])
    assert lines[-1].startswith("ghm-jax: ")


@pytest.mark.parametrize(
    "command",
    [
        "train tiny.py",
        "evaluate run",
        "predict run x.png --out found",
        "stats run",
        "export run --out d.stablehlo",
        "import w.safetensors tiny.py",
        "bench losses",
        "bench train",
        "bench inference",
        "data inspect tiny.py",
    ],
)
def test_a_platform_that_jax_lacks_is_one_line(place, run_dir, monkeypatch, capsys, command):
    def none(*args):
        raise AssertionError  # as JAX does for JAX_PLATFORMS=cuda where there is none

    (place / "x.png").write_bytes(b"")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", none)
    line = fails(capsys, *command.split())
    for word in ("JAX has no device for", "'cuda'", "set JAX_PLATFORMS=cpu"):
        assert word in line


def test_a_tilde_is_the_home_directory_wherever_a_path_is_given(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    words = ["~/tiny.py", "--run-dir=~/run", "--data.dir", "~/data", "--split=~", "a~b"]
    arguments = Arguments.split(words)
    assert arguments.words == [
        f"{place}/tiny.py",
        f"--run-dir={place}/run",
        *("--data.dir", f"{place}/data", f"--split={place}", "a~b"),
    ]
    a = parse(Train, Arguments.split(words[:4]), "ghm-jax", Train("~/tiny.py"))
    assert a.experiment == f"{place}/tiny.py"
    assert (a.run_dir, a.config.data.dir) == (f"{place}/run", f"{place}/data")


def test_a_command_works_without_a_home_directory(run_dir, place, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GHM_JAX_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    main(["train", "tiny.py", "--run-dir", run_dir])
    assert "complete at step 6" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert (
        "BAD   cache           compiled programs and converted weights are not kept (no home"
        in (capsys.readouterr().out)
    )


def test_a_description_is_a_table_of_the_network(place, capsys):
    settings = ["--model.remat", "True", "--model.frozen-stages", "1"]
    main(["describe", "tiny.py", "--size", "64", "96", *settings])
    out, err = capsys.readouterr()
    assert err == ""
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert out.startswith("resnet10, image of 64 x 96 pixels (height x width), 3 classes\n")
    number = {
        name: int(row[0].replace(",", "")) for name, row in rows.items() if row[0][0].isdigit()
    }
    parts = ("backbone", "fpn", "class_head", "box_head")
    assert sum(number[part] for part in parts) == number["total"]
    assert int(rows["backbone"][1].replace(",", "")) < number["backbone"]
    assert number["anchors"] == 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1


def test_a_complete_run_is_not_trained_again(run_dir, capsys):
    main(["train", "tiny.py", "--run-dir", run_dir])
    out, _ = capsys.readouterr()
    assert "complete at step 6" in out
    assert "ghm-jax evaluate run" in out


def test_overrides_reach_the_run_and_the_installed_command_trains(place):
    """As a user runs it: in a separate process that has not started JAX yet."""
    command = [sys.executable, "-c", "from ghm_jax.cli import main; main()"]
    settings = ["--run-dir", "out", "--optimizer.steps", "2", "--run.devices=1"]
    done = subprocess.run(
        [*command, "train", "tiny.py", *settings],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "out: done; evaluate it with: ghm-jax evaluate out" in done.stdout
    assert "new run of 2 steps on 1 cpu device, 10 images of squares" in done.stdout
    assert (place / "out" / "checkpoints" / "2").is_dir()
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_a_closed_pipe_is_not_an_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from ghm_jax.cli import main; main()"]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_out_of_memory_is_one_line_with_the_remedy(place, monkeypatch, capsys):
    def train(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr("ghm_jax.train.train", train)
    with pytest.raises(SystemExit):
        main(["train", "tiny.py"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("ghm-jax: out of memory (Out of memory allocating 7 bytes.); raise")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.remat", "True"], True),
        (["--model.remat=True"], True),
        (["--model.remat"], True),
        (["--model.remat", "--seed", "1"], True),
        (["--model.remat", "False"], False),
        (["--model.no-remat"], False),
    ],
)
@pytest.mark.parametrize(("command", "kind"), [("train", Train), ("import", Import)])
def test_switches_are_spelled_alike_in_all_commands(command, kind, words, expected):
    positionals = {"train": ["tiny.py"], "import": ["w.pth", "tiny.py"]}[command]
    default = Config(model=Model(remat=not expected))
    arguments = Arguments.split([*positionals, *words])
    given = parse(kind, arguments, "ghm-jax", kind(*positionals, config=default))
    assert given.config.model.remat is expected
    assert given.config.seed == (1 if "--seed" in words else 0)


ODD_WORDS = st.sampled_from(
    ["", "0", "3", "-1", "+5", "1_0", " 7", "0x10", "1e3", "nan", "-0.0", "2" * 5000, "١", "True",
     "true", "None", "sgd", "a b", "a\nb", "\ud800", "\0", "猫", "--help", "[]", "(1, 2)", "='"]
)  # fmt: skip


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "15")), deadline=None)
@given(
    key=st.sampled_from(sorted(flatten(Config()))),
    spelling=st.sampled_from(["--{}={}", "--{} {}", "--{}={} 3", "--{}", "--{}x={}", "-{}={}"]),
    word=ODD_WORDS | st.text(max_size=4) | st.integers().map(str) | st.floats().map(str),
)
def test_an_override_of_any_text_is_what_python_reads_or_one_line(key, spelling, word):
    first, *more = spelling.split(" ")
    words = [first.format(key, word), *(part.format(word) for part in more)]
    default = Train("x.py", config=Config())
    line = ""
    try:
        found = parse(Train, Arguments.split(["x.py", *words]), "ghm-jax train", default).config
        found.check()
    except ConfigError as error:
        line = str(error)
    except SystemExit as exit_:
        if exit_.code or "--help" not in words:
            raise
        return
    assert "\n" not in line
    assert len(line) < 900
    if line:
        return
    new, old = flatten(found), flatten(Config())
    assert {name for name in new if new[name] != old[name]} <= {key}
    if isinstance(old[key], bool):
        assert str(new[key]) == (word if "{}={}" in spelling or " " in spelling else "True")
    elif not isinstance(old[key], tuple):
        assert new[key] == type(old[key])(os.path.expanduser(word))


def test_arguments_are_split_once_into_positionals_and_options():
    words = ["a.py", "b", "--data.on-error=skip", "--size", "3", "-4", "-h", "--data_dir", "x"]
    arguments = Arguments.split(words)
    assert arguments.positionals == ("a.py", "b")
    assert [tuple(option) for option in arguments.options] == [
        ("data.on_error", ("--data.on-error=skip",)),
        ("size", ("--size", "3", "-4")),
        ("h", ("-h",)),
        ("data_dir", ("--data_dir", "x")),
    ]
    assert arguments.help_wanted
    assert arguments.words == words
    assert arguments.section("data").words == ["--data.on-error=skip"]


def test_names_in_backticks_become_options_and_nothing_else_does():
    error = ArgumentError("run_dir", "`x_y` is not `data.on_error`", "see `a b` or `C`")
    assert str(error) == "run_dir: `x_y` is not `data.on_error`; see `a b` or `C`"
    assert one_line(error) == "--run-dir: --x-y is not --data.on-error; see `a b` or `C`"
    error = ConfigError("data.on_error", "wrong")
    assert one_line(error) == "data.on_error: wrong"


def test_another_error_of_jax_keeps_its_traceback(place, monkeypatch):
    def train(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("ghm_jax.train.train", train)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["train", "tiny.py"])

"""One file of a prepared data set is changed: what is read is what was there before, or one line.

The records before the change are the oracle; only names and ids of classes may be others, where
their own file says so.
"""

import copy
import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CATEGORIES, tiny_config

from ghm_jax.data import coco_ground_truth, open_dataset, prepare_folder
from ghm_jax.data.loader import training_groups
from ghm_jax.exceptions import UserError

fuzz = settings(
    max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
NAME = "squares/1.0.0"
INFO, FEATURES, METADATA = "dataset_info.json", "features.json", "metadata.json"
CLASSES, INDEX = "objects-label.labels.txt", "index-train.npz"
SHARDS = {s: f"squares-{s}.array_record-00000-of-00001" for s in ("train", "validation")}
FILES = (INFO, FEATURES, METADATA, CLASSES, INDEX, *SHARDS.values())


def everything(data_dir, split):
    """All that a data set tells of a split, in plain types."""
    data = tiny_config(data_dir).data
    dataset = open_dataset(data, split)
    records = [
        {
            key: {k: np.asarray(v).ravel().tolist() for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in record.items()
        }
        for record in dataset.source
    ]
    assert len(dataset.checksum) == 64
    index = [array.tolist() for array in dataset.index]
    truth = coco_ground_truth(dataset)
    training_groups(dataset, data)
    return {
        "names": dataset.class_names,
        "ids": dataset.category_ids,
        "index": index,
        "boxes": [row["bbox"] for row in truth["annotations"]],
        "records": records,
    }


@pytest.fixture(scope="module")
def good(dataset_dir):
    """What each split tells, and the contents of the files."""
    told = {split: everything(dataset_dir, split) for split in SHARDS}
    return told, {name: (dataset_dir / NAME / name).read_bytes() for name in FILES}


@pytest.fixture
def data_dir(good, tmp_path):
    """A data set to be damaged."""
    return written(good, tmp_path)


def written(good, folder):
    directory = folder / "data" / NAME
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in good[1].items():
        (directory / name).write_bytes(content)
    return folder / "data"


def tried(action):
    """What the action returns, and the line that it is refused with."""
    try:
        return action(), ""
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 700
    assert "; " in line  # what to do
    return None, line


def refusal(action):
    """The line that the action is refused with."""
    value, line = tried(action)
    assert line, value
    return line


def flipped(content):
    middle = len(content) // 4
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "no text": lambda content: b"\xff\xfe\xfa" + content,
}


@pytest.mark.parametrize("how", [*DAMAGE, "missing", "a directory", "a byte"])
@pytest.mark.parametrize("name", [INFO, METADATA, CLASSES, SHARDS["train"]])
def test_a_damaged_file_is_named_with_the_remedy(good, data_dir, name, how):
    file = data_dir / NAME / name
    content = file.read_bytes()
    if how in ("missing", "a directory"):
        file.unlink()
        if how == "a directory":
            file.mkdir()
    elif how == "a byte" and name in SHARDS.values():
        file.write_bytes(flipped(content))
    elif how == "a byte" or (how, name) == ("no text", SHARDS["train"]):
        return  # another text, or the start of a block that is not read
    else:
        file.write_bytes(DAMAGE[how](content))
    line = refusal(lambda: everything(data_dir, "train"))
    assert name in line or "3 category ids" in line
    assert "prepare" in line
    if name in SHARDS.values():
        assert everything(data_dir, "validation") == good[0]["validation"]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (INFO, b'"10"', b'"9"'),  # records of a shard
        (INFO, b'"10"', b'"11"'),
        (INFO, b'"10"', b'"-10"'),
        (INFO, b'"10"', b'"5", "5"'),
        (INFO, b'"squares"', b'"circles"'),
        (INFO, b"{SPLIT}", b"{SPLAT}"),
        (INFO, b'"version": "1', b'"version": "a'),
        (FEATURES, b'"bool"', b'"string"'),
        (FEATURES, b'"int64"', b'"string"'),
        (FEATURES, b'"int64"', b'"int6"'),
        (FEATURES, b"image_feature.Image", b"image_feature.Imaqe"),
        (FEATURES, b'"3"', b'"4"'),
        (METADATA, b'"category_ids"', b'"categories"'),
        (METADATA, b"[2, 5, 9]", b"[2, 5]"),
        (METADATA, b"[2, 5, 9]", b"[2, 5, 5]"),
        (METADATA, b"[2, 5, 9]", b"[2, 5, true]"),
        (METADATA, b"[2, 5, 9]", b'[2, 5, "9"]'),
        (METADATA, b"[2, 5, 9]", b"[2, 5, NaN]"),
        (METADATA, b"[2, 5, 9]", b"[2, 5, -9]"),
        (METADATA, b"[2, 5, 9]", b"259"),
        (METADATA, b'{"train"', b'5, "x": {"train"'),
        (CLASSES, b"absent\n", b""),
    ],
)
def test_a_value_that_cannot_be_is_refused(data_dir, capsys, name, old, new):
    file = data_dir / NAME / name
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    line = refusal(lambda: everything(data_dir, "train"))
    assert str(data_dir) in line or "squares" in line
    assert "prepare" in line
    assert capsys.readouterr().out == ""


def test_exchanged_shards_are_refused(data_dir):
    first, second = (data_dir / NAME / shard for shard in SHARDS.values())
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert f"{first}: cannot be read (it holds 6 records, not 10)" in refusal(
        lambda: everything(data_dir, "train")
    )


def test_ids_as_whole_floats_are_the_same(good, data_dir):
    file = data_dir / NAME / METADATA
    file.write_bytes(file.read_bytes().replace(b"[2, 5, 9]", b"[2.0, 5, 9]"))
    assert everything(data_dir, "train") == good[0]["train"]


def test_a_damaged_index_is_made_again(good, data_dir):
    file = data_dir / NAME / INDEX
    for change in (
        lambda index: index["sizes"][:9],
        lambda index: index["objects"],
        lambda index: -index["sizes"],
        lambda index: index["sizes"].astype(str),
    ):
        with np.load(file) as kept:
            index = dict(kept)
        np.savez(file, **{**index, "sizes": change(index)})
        assert everything(data_dir, "train") == good[0]["train"]
        assert file.read_bytes() != b""


def test_a_damaged_record_is_named(data_dir):
    data = tiny_config(data_dir).data
    file = data_dir / NAME / SHARDS["train"]
    content = bytearray(file.read_bytes())
    start = content.index(b"train0.png")
    content[start : start + 6] = b"TRAIN0"
    file.write_bytes(content)
    source = open_dataset(data, "train").source  # what it holds is not read yet
    line = refusal(lambda: list(source))
    assert f"{file}: record " in line
    with pytest.raises(IndexError):
        source[10]


def test_a_damaged_data_set_that_is_embedded_is_one_line(tmp_path):
    file = tmp_path / "digit_scenes" / "1.0.0" / INFO
    file.parent.mkdir(parents=True)
    file.write_text("{")  # and no features.json: it would be built
    data = tiny_config(tmp_path).data
    data = dataclasses.replace(data, name="digit_scenes")
    assert str(file) in refusal(lambda: open_dataset(data, "train"))


def sources(dataset_dir):
    folder = dataset_dir.parent
    return {split: (folder, folder / f"{split}.json") for split in SHARDS}


def test_preparing_again_over_damaged_data_is_one_line(dataset_dir, data_dir):
    for name in (INFO, FEATURES, METADATA):
        file = data_dir / NAME / name
        content = file.read_bytes()
        file.write_bytes(content[:-9])
        line = refusal(lambda: prepare_folder("squares", data_dir, sources(dataset_dir)))
        assert f"{file}: " in line
        assert f"delete {data_dir / NAME} and prepare the data again" in line
        file.write_bytes(content)
    file.write_bytes(b'{"sources": {"train": {}, "validation": {"images": []}}}')
    assert "made from other files" in refusal(
        lambda: prepare_folder("squares", data_dir, sources(dataset_dir))
    )


# Fuzz

NUMBERS = (0, 1, -1, 3, 7, 2**31, 2**63, -(2**70), 10**400, 0.5, 1e300, math.nan, math.inf)
TEXTS = (
    "",
    "x",
    "train",
    "1.0.0",
    "\ud800",
    "猫",
    "../..",
    "0",
    "-1",
    "9",
    "1e9",
    "9" * 30,
    "bool",
)
OTHERS = (None, True, False, [], [1], [[]], {}, {"x": 1}, [None], ["train"])
VALUES = st.sampled_from(NUMBERS + TEXTS + OTHERS)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1")


def places(value, path=()):
    """The paths of all values in JSON."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def changed_json(draw, content):
    found = copy.deepcopy(json.loads(content))
    repeated = None
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(found))))
        if not path:
            continue
        holder = found
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["value", "value", "drop", "name", "move", "key twice"]))
        if how == "drop":
            del holder[path[-1]]
        elif how == "value" or isinstance(holder, list):
            holder[path[-1]] = copy.deepcopy(draw(VALUES))
        elif how == "name":
            holder[draw(st.sampled_from(["", "x", "train", path[-1].upper()]))] = holder.pop(
                path[-1]
            )
        elif how == "move":
            found[path[-1]] = holder.pop(path[-1])
        else:
            repeated = path[-1], draw(VALUES)
    text = json.dumps(found, ensure_ascii=draw(st.booleans()))
    if repeated and text.startswith("{"):
        text = f"{{{json.dumps(repeated[0])}: {json.dumps(repeated[1])}, {text[1:]}"
    encoded = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    if draw(st.integers(0, 9)) == 0:
        return encoded[: draw(st.integers(0, len(encoded) - 1))]
    return encoded


@st.composite
def changed_bytes(draw, files, name):
    """Other contents; None: the file is missing, a directory if it is text."""
    content = bytearray(files[name])
    start = draw(st.integers(0, len(content) - 1))
    size = draw(st.sampled_from([1, 2, 16, 300, 4096, 65536]))
    how = draw(st.sampled_from(["bit"] * 3 + ["zeros", "cut", "remove", "double", "swap", "none"]))
    if how == "bit":
        content[start] ^= 1 << draw(st.integers(0, 7))
    elif how == "zeros":
        content[start : start + size] = bytes(len(content[start : start + size]))
    elif how == "cut":
        del content[start:]
    elif how == "remove":
        del content[start : start + size]
    elif how == "double":
        content[start:start] = content[start : start + size]
    elif how == "swap":
        return files[draw(st.sampled_from(FILES))]
    else:
        return draw(st.sampled_from([None, "a directory", b""]))
    return bytes(content)


@fuzz
@given(st.data())
def test_a_changed_file_is_read_as_before_or_is_one_line(dataset_dir, good, tmp_path_factory, data):
    told, files = good
    data_dir = written(good, tmp_path_factory.getbasetemp() / "fuzz")
    name = data.draw(st.sampled_from(FILES))
    structured = name.endswith(".json") and data.draw(st.integers(0, 3)) > 0
    content = data.draw(changed_json(files[name]) if structured else changed_bytes(files, name))
    file = data_dir / NAME / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.unlink()
        if content:
            file.mkdir()
    for split in SHARDS:
        found, line = tried(lambda split=split: everything(data_dir, split))
        if line:
            assert str(data_dir) in line or "squares" in line
            continue
        if name == CLASSES:
            assert len(set(found.pop("names"))) == len(CATEGORIES)
        if name == METADATA:
            ids = found.pop("ids")
            assert len(set(ids)) == len(CATEGORIES)
            assert all(type(number) is int and number >= 0 for number in ids)
        assert found == {key: told[split][key] for key in found}
    if name in (INFO, FEATURES, METADATA) and (data_dir / NAME / FEATURES).is_file():
        before = {path: path.read_bytes() for path in data_dir.rglob("*.*") if path.is_file()}
        tried(lambda: prepare_folder("squares", data_dir, sources(dataset_dir)))
        assert {p: p.read_bytes() for p in data_dir.rglob("*.*") if p.is_file()} == before

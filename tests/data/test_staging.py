"""A data set in a bucket is that of a disk; what is needed of it is copied once and whole."""

import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from bucket_emulator import URL
from tiny import Listener, write_images

from ghm_jax.bucket import BucketPath
from ghm_jax.config import Data
from ghm_jax.data import open_dataset, prepare_folder, staging
from ghm_jax.data.dataset import describe_dataset
from ghm_jax.data.index import read_index
from ghm_jax.exceptions import ArgumentError, ConfigError
from ghm_jax.storage import as_path, remove_tree

PLACE = f"{URL}/data"
SHARD = "squares-{}.array_record-00000-of-00001"


@pytest.fixture(autouse=True)
def cache(store, tmp_path, monkeypatch):
    """Where the copies are."""
    monkeypatch.setenv("GHM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/data/bucket/data/squares/1.0.0"


@pytest.fixture
def reads(monkeypatch):
    """Names and numbers of bytes of all blocks that are read from the bucket."""
    found, usual = [], BucketPath.read_bytes

    def read_bytes(path, start=None, end=None):
        block = usual(path, start, end)
        found.append((path.name, len(block)))
        return block

    monkeypatch.setattr(BucketPath, "read_bytes", read_bytes)
    return found


@pytest.fixture
def images(tmp_path):
    """What the data set is prepared from."""
    (tmp_path / "images").mkdir()
    return write_images(tmp_path / "images")


def in_bucket(images, progress=None):
    return prepare_folder("squares", PLACE, images, progress=progress)


def data(**more):
    return Data(name="squares", dir=PLACE, **more)


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_a_data_set_in_a_bucket_is_the_same_as_on_a_disk(images, cache, tmp_path):
    assert str(in_bucket(images)) == f"{PLACE}/squares/1.0.0"
    shutil.rmtree(cache)  # another machine
    prepare_folder("squares", tmp_path / "here", images)
    there, here = (
        open_dataset(Data(name="", dir=str(place)), "train") for place in (PLACE, tmp_path / "here")
    )
    for field in ("name", "class_names", "category_ids", "checksum", "folder", "like_corners"):
        assert getattr(there, field) == getattr(here, field)
    assert len(there) == len(here) > 0
    for a, b in zip(there.source, here.source, strict=True):
        assert a["image"] == b["image"]
        np.testing.assert_array_equal(a["objects"]["bbox"], b["objects"]["bbox"])
    assert SHARD.format("train") in names(cache)
    assert SHARD.format("validation") not in names(cache)  # not needed yet


def test_what_is_there_is_not_copied_again(images, cache, reads):
    in_bucket(images)
    open_dataset(data(), "train")
    assert reads == []  # made on this machine
    shutil.rmtree(cache)
    describe_dataset(data())
    assert not any("array_record" in name for name, _ in reads)
    open_dataset(data(), "train")
    (cache / SHARD.format("train")).write_bytes(b"cut")
    reads.clear()
    dataset = open_dataset(data(), "train")
    assert [name for name, _ in reads] == [SHARD.format("train")]
    assert dataset.source[0]["image"]


def test_a_copy_that_was_stopped_goes_on_after_the_last_block(images, cache, reads, monkeypatch):
    in_bucket(images)
    shutil.rmtree(cache)
    describe_dataset(data())
    monkeypatch.setattr(staging, "BLOCK", 1000)
    size = BucketPath(f"{PLACE}/squares/1.0.0/{SHARD.format('train')}").stat().st_size
    counting = BucketPath.read_bytes

    def read_bytes(path, start=None, end=None):
        if start and start >= 3000:
            raise OSError(5, "the connection broke", str(path))
        return counting(path, start, end)

    reads.clear()
    with monkeypatch.context() as broken:
        broken.setattr(BucketPath, "read_bytes", read_bytes)
        with pytest.raises(ConfigError) as error:
            open_dataset(data(), "train")
    assert "cannot be copied (the connection broke); call again" in str(error.value)
    assert sum(count for _, count in reads) == 3000
    assert len(open_dataset(data(), "train").source[0]["image"]) > 0
    assert sum(count for _, count in reads) == size
    assert not list(cache.glob("*.part"))


def test_data_prepared_again_replaces_the_copies(images, cache, tmp_path):
    in_bucket(images)
    of_another_machine = data(cache=str(tmp_path / "other"))
    before = open_dataset(of_another_machine, "train")
    assert len(before.index.sizes) == len(before)  # cached beside the copies
    remove_tree(as_path(PLACE))
    shutil.rmtree(cache)
    folder, path = images["train"]
    content = json.loads(path.read_text())
    small, large = content["images"][:2]
    (folder / small["file_name"]).write_bytes((folder / large["file_name"]).read_bytes())
    content["images"][0] = {**large, "id": small["id"], "file_name": small["file_name"]}
    path.write_text(json.dumps(content))
    in_bucket(images)
    after = open_dataset(of_another_machine, "train")
    np.testing.assert_array_equal(after.index.sizes, read_index(after.source).sizes)
    assert not np.array_equal(after.index.sizes, before.index.sizes)


def test_another_data_set_of_that_name_is_refused_and_the_same_is_kept(images, cache, store):
    in_bucket(images)
    before = store.objects
    shutil.rmtree(cache)  # another machine
    listener = Listener()
    in_bucket(images, listener)
    assert any("already prepared" in line for line in listener.lines)
    shutil.rmtree(cache)
    folder = images["train"][0]
    (folder / "train0.png").write_bytes((folder / "train3.png").read_bytes())
    with pytest.raises(ArgumentError, match="made from other files"):
        in_bucket(images)
    assert store.objects == before


def test_an_upload_that_was_stopped_is_no_data_set_and_goes_on(images, store, monkeypatch):
    usual, uploaded = BucketPath.upload, []

    def upload(path, file):
        if len(uploaded) == 3:
            raise OSError(5, "the connection broke", str(path))
        uploaded.append(file.name)
        usual(path, file)

    with monkeypatch.context() as broken:
        broken.setattr(BucketPath, "upload", upload)
        with pytest.raises(ConfigError, match="call again"):
            in_bucket(images)
    with pytest.raises(ConfigError, match="no prepared data set"):
        open_dataset(data(), "train")
    again = []
    monkeypatch.setattr(
        BucketPath, "upload", lambda path, file: (again.append(file.name), usual(path, file))
    )
    changed = as_path(PLACE) / "squares/1.0.0" / uploaded[0]
    changed.write_bytes(bytes(changed.stat().st_size))
    in_bucket(images)
    assert set(uploaded) & set(again) == {uploaded[0]}
    assert again[-1] == "features.json"
    assert len(open_dataset(data(), "validation")) > 0


def test_processes_of_a_machine_share_the_copies(images, cache, reads):
    in_bucket(images)
    shutil.rmtree(cache)
    listeners = [Listener() for _ in range(3)]
    threads = [
        threading.Thread(target=open_dataset, args=(data(), "train", listener))
        for listener in listeners
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    copied = [name for name, _ in reads]
    assert len(copied) == len(set(copied))
    assert SHARD.format("train") in names(cache)


def test_a_disk_that_is_too_small_and_a_cache_that_cannot_be_written_are_one_line(
    images, cache, tmp_path, monkeypatch
):
    in_bucket(images)
    shutil.rmtree(cache)
    usage = namedtuple("usage", "free")(1000)
    with monkeypatch.context() as full:
        full.setattr(staging.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ConfigError) as small:
            open_dataset(data(), "train")
    assert str(small.value).startswith("data.cache: 0.0 GB are to be copied to ")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data.cache: .* cannot be written"):
        open_dataset(data(cache=str(tmp_path / "file")), "train")
    assert len(open_dataset(data(cache=str(tmp_path / "other")), "train"))
    assert (tmp_path / "other/bucket/data/squares/1.0.0/features.json").is_file()
    monkeypatch.delenv("GHM_JAX_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(ConfigError, match=r"data.cache: empty, and there is no home directory"):
        open_dataset(data(), "train")


def test_a_copy_that_is_not_what_the_bucket_holds_is_noticed(images, cache, monkeypatch):
    in_bucket(images)
    shutil.rmtree(cache)
    usual = BucketPath.read_bytes

    def read_bytes(path, start=None, end=None):
        block = usual(path, start, end)
        return block if start is None else bytes(1) + block[1:]

    monkeypatch.setattr(BucketPath, "read_bytes", read_bytes)
    with pytest.raises(ConfigError, match="the copy differs from it"):
        open_dataset(data(), "train")
    assert not list(cache.glob("*.part"))


def test_the_embedded_data_set_is_built_in_the_cache(tmp_path):
    dataset = open_dataset(Data(name="digit_scenes", dir=PLACE), "validation[:2]")
    assert len(dataset) == 2
    assert (tmp_path / "cache/data/bucket/data/digit_scenes").is_dir()


def test_a_place_without_data_and_other_stores_are_one_line():
    with pytest.raises(ConfigError, match=rf"data\.dir: no prepared data set 'squares' in {PLACE}"):
        open_dataset(data(), "train")
    with pytest.raises(ConfigError, match="no data set in"):
        open_dataset(Data(name="", dir=PLACE), "train")
    with pytest.raises(ConfigError, match="only directories and gs://"):
        open_dataset(Data(dir="s3://bucket/data"), "train")
    with pytest.raises(ConfigError, match="there is no such bucket"):
        open_dataset(Data(dir="gs://nowhere/data"), "train")

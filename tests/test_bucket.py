"""A place in a bucket behaves as one on a disk, and a bucket that cannot be used is one line."""

import pytest
from bucket_emulator import URL, running_store

from ghm_jax.exceptions import ConfigError
from ghm_jax.storage import GrowingFiles, as_path, create, move, remove_if, set_aside

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A directory that exists only as long as something is in it."""
    return tmp_path / "a" if request.param == "disk" else as_path(f"{URL}/a")


def fill(place, **files):
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name).write_text(text)


def test_what_is_written_is_read_and_listed(place):
    assert [place.exists(), place.is_dir(), *place.glob("*")] == [False, False]
    fill(place, one="1", two="\r2\r")
    (place / "sub").mkdir()
    (place / "sub" / "three").write_bytes(b"\0\r\n\xff\r")
    assert [place.is_dir(), place.is_file(), (place / "one").is_file()] == [True, False, True]
    assert sorted(path.name for path in place.iterdir()) == ["one", "sub", "two"]
    assert [path.name for path in place.glob("t*")] == ["two"]
    assert [path.name for path in place.glob("sub/*")] == ["three"]
    assert (place / "two").read_bytes() == b"\r2\r"
    assert (place / "sub" / "three").read_bytes() == b"\0\r\n\xff\r"
    assert (place / "one").stat().st_size == 1


def test_what_is_missing_is_an_error_as_on_a_disk(place):
    for read in (place.read_bytes, place.unlink, place.stat, lambda: list(place.iterdir())):
        with pytest.raises(FileNotFoundError) as missing:
            read()
        assert missing.value.filename == str(place)
    place.unlink(missing_ok=True)


def test_a_file_is_created_once(place):
    fill(place, other="")
    create(place / "lock", "first")
    with pytest.raises(FileExistsError):
        create(place / "lock", "second")
    assert (place / "lock").read_text() == "first"


def test_a_file_is_removed_only_if_it_is_as_it_was(place):
    fill(place, lock="mine")
    assert not remove_if(place / "lock", "other")
    assert (place / "lock").read_text() == "mine"
    assert remove_if(place / "lock", "mine")
    assert not (place / "lock").exists()
    assert not remove_if(place / "lock", "mine")


def test_a_file_that_was_written_again_is_not_removed(store, monkeypatch):
    """Between the look at it and the removal, by another process."""
    file = as_path(f"{URL}/lock")
    file.write_text("mine")
    read = type(file).read_bytes

    def read_and_wait(path):
        found = read(path)
        path.write_bytes(found)
        return found

    monkeypatch.setattr(type(file), "read_bytes", read_and_wait)
    assert not remove_if(file, "mine")
    assert store.objects == {"lock": b"mine"}


def test_a_directory_is_moved_whole(place):
    fill(place, one="1")
    fill(place / "sub", two="2")
    new = move(place, place.with_name("b"))
    assert not place.exists()
    assert [(new / "one").read_text(), (new / "sub" / "two").read_text()] == ["1", "2"]


def test_a_directory_that_is_set_aside_twice_replaces_nothing(place):
    places = []
    for text in ("first", "second"):
        fill(place, one=text)
        places.append(set_aside(place))
    assert [(path / "one").read_text() for path in places] == ["first", "second"]


def test_files_that_grow_are_copied_when_it_is_time(store, tmp_path):
    files = GrowingFiles(as_path(f"{URL}/run"), every=3600)
    (files.path / "log").write_text("one\n")
    files.copy_if_due()
    assert not store.objects
    files.copy()
    asked = store.faults.asked
    files.copy()  # nothing has changed
    assert store.faults.asked == asked
    (files.path / "sub").mkdir()
    (files.path / "sub" / "log").write_text("two\n")
    files.close()
    assert store.objects == {"run/log": b"one\n", "run/sub/log": b"two\n"}
    assert not files.path.exists()
    on_disk = GrowingFiles(tmp_path)
    assert on_disk.path == tmp_path
    on_disk.close()
    assert tmp_path.exists()


def test_what_cannot_be_asked_for_is_not_taken_for_missing(store):
    """Of a bucket that answers nobody, `exists` must not say that a run is not there."""
    place = as_path(f"{URL}/run")
    place.write_text("")
    store.faults.every, store.faults.status = 1, 403
    for ask in (place.exists, place.is_dir, place.is_file, lambda: list(place.glob("*"))):
        with pytest.raises(OSError, match=r"\[Errno 13\] .*gs://bucket/run"):
            ask()


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("gs://nobody-has-this/run", ["gs://nobody-has-this", "no such bucket", "create"]),
        ("gs://No_Bucket/run", ["gs://No_Bucket/run", "cannot be the name of a bucket"]),
        ("gs://", ["cannot be the name of a bucket", "gs://BUCKET/DIR"]),
        ("s3://bucket/run", ["only directories and gs://... can be used, not s3://...", "mount"]),
    ],
)
def test_what_is_no_bucket_is_one_line(location, words):
    with pytest.raises(ConfigError) as refused:
        as_path(location)
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_bucket_without_permission_is_one_line():
    with running_store() as other:
        other.faults.every, other.faults.status = 1, 403
        with pytest.raises(ConfigError, match=r"gs://bucket: .* may not use .*; grant it Storage"):
            as_path(f"{URL}/run")


def test_a_machine_without_credentials_is_one_line(monkeypatch, tmp_path):
    from bucket_emulator import forget_store

    forget_store()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(ConfigError, match=r"gs://bucket: no Google credentials .* auth applic"):
        as_path(f"{URL}/run")

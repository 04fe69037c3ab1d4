"""Data sets on disk: written without TensorFlow, opened for random access to their records."""

import contextlib
import functools
import hashlib
import io
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from ghm_jax.config import Data
from ghm_jax.data.index import Index, read_index
from ghm_jax.data.prepare.digit_scenes import DigitScenes
from ghm_jax.data.records import (
    CLASS_NAMES,
    DESCRIPTION,
    Records,
    read_builder,
    read_folder,
    read_metadata,
    reading,
)
from ghm_jax.data.schema import category_ids_of, classes_problem, detection_features
from ghm_jax.data.staging import local_directory, stage
from ghm_jax.exceptions import ConfigError, UserError
from ghm_jax.progress import Progress, Silent
from ghm_jax.storage import as_path, is_bucket


@dataclass(frozen=True)
class Dataset:
    """One split of a data set. Its pickle is small: worker processes open the files themselves."""

    source: Sequence[dict[str, Any]]
    """Records by index, in the schema of TFDS `coco/2017`; images are encoded bytes."""
    name: str
    """TFDS name."""
    class_names: tuple[str, ...]
    """Class names in label order."""
    category_ids: tuple[int, ...]
    """COCO category id of each label."""
    index_file: Path | None = None
    """Where `index` is cached, beside the records."""
    like_corners: bool = False
    """The boxes that it was prepared from look like corners."""
    folder: Path | None = None
    """The folder that its images were prepared from, if that is known."""

    @functools.cached_property
    def index(self) -> Index:
        """Sizes and counts of all images; see `read_index`. The first call reads every record."""
        return read_index(self.source, self.index_file)

    @property
    def checksum(self) -> str:
        """Of its description: splits, classes, and the files it was prepared from. Prepared again
        from the same files it is the same."""
        digest = hashlib.sha256()
        files = [self.index_file.with_name(name) for name in DESCRIPTION] if self.index_file else []
        for file in files:
            with reading(file):
                digest.update(file.read_bytes() if file.exists() else b"")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Description:
    """What the files of a prepared data set say of it, without its records."""

    place: Path
    """Where it is."""
    directory: Path
    """Where it is on a disk: `place`, or of a data set in a bucket, the copy of it."""
    name: str
    """TFDS name."""
    builder: Any
    """Of TFDS."""
    class_names: tuple[str, ...]
    """In label order."""
    category_ids: tuple[int, ...]
    """COCO category id of each label."""
    like_corners: tuple[str, ...]
    """The splits whose boxes look like corners in the annotations."""


def describe_dataset(data: Data, progress: Progress | None = None) -> Description:
    """The description of the data set `data.name` in `data.dir`.

    The embedded data set `digit_scenes` is built there first if it is missing (if that is a bucket,
    in the cache).

    Args:
        data: which data set.
        progress: receives progress updates if it is in a bucket.

    Raises:
        ConfigError: no such data set, one that cannot be read, or whose class names are not those
            that it was prepared from.
    """
    place = as_path(data.dir)
    name = data.name or _only_dataset(place)
    if name == DigitScenes.name and not _versions(place / name):
        place = local_directory(place, data.cache) if is_bucket(place) else place
        if not _versions(place / name):
            _build_digit_scenes(str(place))
    versions = _versions(place / name)
    if not versions:
        raise ConfigError(
            "data.dir",
            f"no prepared data set {name!r} in {data.dir}",
            "prepare it there with ghm-jax data prepare, or set `data.dir` to where it is",
        )
    place = directory = versions[-1]
    if is_bucket(place):
        directory = stage(place, data.cache, _is_no_shard, progress or Silent())
    builder, metadata = read_builder(directory), read_metadata(directory)
    _check_format(builder, name)
    with reading(directory / CLASS_NAMES):  # without names TFDS calls the classes 0, 1, 2
        if not (directory / CLASS_NAMES).read_bytes().strip():
            raise ValueError("it is empty")
    class_names = tuple(builder.info.features["objects"]["label"].names)
    if "category_ids" not in metadata and _has_own_ids(builder):
        with reading(directory / DESCRIPTION[-1]):
            raise ValueError("no category_ids")
    category_ids = tuple(metadata.get("category_ids", category_ids_of(class_names)))
    if problem := classes_problem(class_names, category_ids):
        raise ConfigError(str(directory), problem, "prepare it again from its annotations")
    like_corners = tuple(metadata.get("like_corners", ()))
    return Description(place, directory, name, builder, class_names, category_ids, like_corners)


def open_dataset(data: Data, split: str, progress: Progress | None = None) -> Dataset:
    """Opens a split of the data set `data.name` in `data.dir`; see `describe_dataset`.

    Args:
        data: which data set.
        split: TFDS split or slice of one, such as `train[:1%]`.
        progress: receives progress updates if it must be copied from a bucket.

    Raises:
        ConfigError: no such data set or split, or one that cannot be read.
    """
    found = describe_dataset(data, progress)
    key = "data.train_split" if split == data.train_split else "data.validation_split"
    _check_split(key, found.name, split, found.builder.info.splits)
    if is_bucket(found.place):
        with reading(found.directory / DESCRIPTION[0]):
            shards = found.builder.info.splits[split].file_instructions
        names = {Path(shard.filename).name for shard in shards}
        stage(found.place, data.cache, names.__contains__, progress or Silent())
    return Dataset(
        source=Records(found.builder, found.directory, split),
        name=found.name,
        class_names=found.class_names,
        category_ids=found.category_ids,
        index_file=found.directory / f"index-{quote(split, safe='')}.npz",
        like_corners=_base(split) in found.like_corners,
        folder=read_folder(found.directory, _base(split)),
    )


def _is_no_shard(name: str) -> bool:
    return ".array_record-" not in name


def _has_own_ids(builder: Any) -> bool:
    """Whether a data set was prepared from annotations here, with the ids of their categories."""
    return builder.__module__.startswith("ghm_jax.") and builder.name != DigitScenes.name


def _base(split: str) -> str:
    """The split that a slice such as `train[:1%]` is of."""
    return re.split(r"\W", split, maxsplit=1)[0]


def _check_split(key: str, name: str, split: str, splits: Any) -> None:
    """Raises ConfigError if `split` is not a split, or a slice of one, that holds images."""
    base = _base(split)
    if base not in splits:
        raise ConfigError(key, f"{name} has no split {base!r}", f"choose from {', '.join(splits)}")
    try:
        num_images = splits[split].num_examples
    except ValueError:
        raise ConfigError(
            key,
            f"{split!r} is not a slice of a split",
            f"write it like {base}[:10%] or {base}[:500]",
        ) from None
    if not num_images:
        raise ConfigError(key, f"{split} of {name} holds no images", "choose a larger slice")


def _versions(directory: Path) -> list[Path]:
    """The prepared versions of a data set, oldest first."""
    versions = [
        path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if tfds.core.Version.is_valid(path.name) and (path / "features.json").is_file()
    ]
    return sorted(versions, key=lambda path: tfds.core.Version(path.name))


def data_set_names(directory: Path) -> list[str]:
    """The prepared data sets in a directory of data sets, sorted."""
    inside = [path for one in directory.glob("*") for path in (one, *one.glob("*"))]
    return sorted(path.relative_to(directory).as_posix() for path in inside if _versions(path))


def _only_dataset(directory: Path) -> str:
    """The name of the only data set in a directory of data sets."""
    names = data_set_names(directory)
    if len(names) != 1:
        found = f"{', '.join(names)} in {directory}" if names else f"no data set in {directory}"
        remedy = "choose one of them" if names else "set `data.dir` to where one is prepared"
        raise ConfigError("data.name", f"empty, and there is {found}", remedy)
    return names[0]


def write_array_record(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a data set that needs no download, without TensorFlow.

    TFDS writes into a temporary directory next to the final one and renames it at the end, so an
    interrupted run leaves no incomplete data set.
    """
    # TFDS prints that it downloads and wants a directory for that, but nothing is downloaded here.
    # Its nested progress bars would hide ours.
    had_bars = tqdm_utils._active
    tqdm_utils.display_progress_bar(False)
    try:
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record", download_dir=downloads)
    finally:
        tqdm_utils.display_progress_bar(had_bars)


def refuse_bucket(kind: type[UserError], key: str, path: str | Path) -> None:
    """Raises a `kind` with this key if images or annotations are at gs://... and the like."""
    scheme, colon, _ = str(path).partition(":/")
    if colon and len(scheme) > 1:  # C:/ is a drive
        raise kind(
            key,
            f"{path} is not a local directory, from which images and annotations are read",
            "mount the bucket (gcsfuse BUCKET DIR) and give the mounted directory",
        )


def _build_digit_scenes(directory: str) -> None:
    place = Path(directory) / DigitScenes.name / str(DigitScenes.VERSION)
    with reading(place / DESCRIPTION[0]):
        builder = DigitScenes(data_dir=directory)
    try:
        write_array_record(builder)
    except OSError:
        if not _versions(Path(directory) / builder.name):  # else another process was faster
            raise


def _check_format(builder: Any, name: str) -> None:
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise ConfigError(
            "data.name",
            f"{name} is stored as {file_format and file_format.value}, which cannot be read "
            "without TensorFlow",
            "prepare it again as array_record (ghm-jax data prepare)",
        )
    needed, found = (
        _leaves(features.get_tensor_info())
        for features in (detection_features(["any"]), builder.info.features)
    )
    if missing := needed.keys() - found.keys():
        raise ConfigError(
            "data.name",
            f"{name} lacks the features {', '.join(sorted(missing))} of coco/2017",
            "prepare it from a COCO instances JSON (ghm-jax data prepare folder)",
        )
    for leaf, (kind, size, rank) in needed.items():
        if found[leaf][0] != kind or found[leaf][1] < min(4, size) or found[leaf][2] != rank:
            raise ConfigError(
                "data.name",
                f"the feature {leaf} of {name} is of another type than in coco/2017",
                "prepare it from a COCO instances JSON (ghm-jax data prepare folder)",
            )


def _leaves(tensors: Any) -> dict[str, tuple[str, int, int]]:
    """{dotted name: (kind of its type, bytes of a value, rank)} of all features."""
    if not hasattr(tensors, "items"):
        dtype = np.dtype(tensors.np_dtype)
        return {"": (dtype.kind, dtype.itemsize, len(tensors.shape))}
    return {
        f"{key}.{leaf}".rstrip("."): value
        for key, sub in tensors.items()
        for leaf, value in _leaves(sub).items()
    }

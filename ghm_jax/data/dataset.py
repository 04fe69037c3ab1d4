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

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from ghm_jax.config import Data
from ghm_jax.data.index import Index, read_index
from ghm_jax.data.prepare.digit_scenes import DigitScenes
from ghm_jax.data.schema import category_ids_of, classes_problem, detection_features
from ghm_jax.exceptions import ConfigError, UserError


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

    @functools.cached_property
    def index(self) -> Index:
        """Sizes and counts of all images; see `read_index`. The first call reads every record."""
        return read_index(self.source, self.index_file)

    @property
    def checksum(self) -> str:
        """Of its description: splits, classes, and the files it was prepared from. Prepared again
        from the same files it is the same."""
        files = sorted(self.index_file.parent.glob("*.json")) if self.index_file else []
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def __len__(self) -> int:
        return len(self.source)


def open_dataset(data: Data, split: str) -> Dataset:
    """Opens a split of the data set `data.name` in `data.dir`.

    The embedded data set `digit_scenes` is built there first if it is missing.

    Args:
        data: which data set.
        split: TFDS split or slice of one, such as `train[:1%]`.

    Raises:
        ConfigError: no such data set or split, one that cannot be read, or whose class names are
            not those that it was prepared from.
    """
    refuse_bucket(ConfigError, "data.dir", data.dir)
    name = data.name or _only_dataset(Path(data.dir))
    if name == DigitScenes.name and not _versions(Path(data.dir) / name):
        _build_digit_scenes(data.dir)
    versions = _versions(Path(data.dir) / name)
    if not versions:
        raise ConfigError(
            "data.dir",
            f"no prepared data set {name!r} in {data.dir}",
            "prepare it there with ghm-jax data prepare, or set `data.dir` to where it is",
        )
    builder = _builder(versions[-1])
    _check_format(builder, name)

    key = "data.train_split" if split == data.train_split else "data.validation_split"
    _check_split(key, name, split, builder.info.splits)
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})

    class_names = tuple(builder.info.features["objects"]["label"].names)
    metadata = builder.info.metadata or {}
    category_ids = tuple(metadata.get("category_ids", category_ids_of(class_names)))
    if problem := classes_problem(class_names, category_ids):
        raise ConfigError(str(versions[-1]), problem, "prepare it again from its annotations")
    return Dataset(
        source=source,
        name=name,
        class_names=class_names,
        category_ids=category_ids,
        index_file=versions[-1] / f"index-{quote(split, safe='')}.npz",
        like_corners=_base(split) in metadata.get("like_corners", ()),
    )


def _builder(directory: Path) -> Any:
    """The TFDS builder of a prepared data set."""
    try:
        return tfds.builder_from_directory(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        problem = f"cannot be read as a data set ({said})"
        raise ConfigError(str(directory), problem, "prepare it again") from None


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
    inside = [*directory.glob("*"), *directory.glob("*/*")]
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
    """Raises a `kind` with this key for gs://... and the like: array_record needs a file system."""
    scheme, colon, _ = str(path).partition(":/")
    if colon and len(scheme) > 1:  # C:/ is a drive
        raise kind(
            key,
            f"{path} is not a local directory, and records can only be written to and read from "
            "one",
            "mount the bucket (gcsfuse BUCKET DIR) and give the mounted directory",
        )


def _build_digit_scenes(directory: str) -> None:
    builder = DigitScenes(data_dir=directory)
    try:
        write_array_record(builder)
    except OSError:
        if not _versions(Path(directory) / builder.name):  # else another process was faster
            raise


def _check_format(builder: tfds.core.DatasetBuilder, name: str) -> None:
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise ConfigError(
            "data.name",
            f"{name} is stored as {file_format and file_format.value}, which cannot be read "
            "without TensorFlow",
            "prepare it again as array_record (ghm-jax data prepare)",
        )
    needed = _leaves(detection_features(["any"]))
    missing = needed - _leaves(builder.info.features)
    if missing:
        raise ConfigError(
            "data.name",
            f"{name} lacks the features {', '.join(sorted(missing))} of coco/2017",
            "prepare it from a COCO instances JSON (ghm-jax data prepare folder)",
        )


def _leaves(features: Any) -> set[str]:
    """Dotted names of all features."""
    inner = getattr(features, "feature", features)  # the elements of a sequence
    if not hasattr(inner, "items"):
        return {""}
    return {f"{key}.{leaf}".rstrip(".") for key, sub in inner.items() for leaf in _leaves(sub)}

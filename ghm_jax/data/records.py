"""The files of a prepared data set: whatever they hold, they are read or are one line.

TFDS, protobuf and array_record raise errors of every kind for a damaged file. Here each becomes one
line that names the file.
"""

import bisect
import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core import dataset_info

from ghm_jax.data.coco_fields import CATEGORY
from ghm_jax.exceptions import ConfigError, DataError, UserError
from ghm_jax.json_text import parse_json

_INFO, _FEATURES, _METADATA = "dataset_info.json", "features.json", "metadata.json"
DESCRIPTION = (_INFO, _FEATURES, _METADATA)
"""The files that describe a data set; the last one is not in those of TFDS itself."""
FOLDERS = "folders.json"
"""{split: folder that its images were prepared from}. It is no part of the description: from a copy
of the folder the data set is the same."""
CLASS_NAMES = "objects-label.labels.txt"
"""The file of the class names, one a line."""


@contextlib.contextmanager
def reading(file: Path, what: str = "", kind: type[UserError] = ConfigError) -> Iterator[None]:
    """An error while a file of a prepared data set is read becomes a `kind` that names it.

    Args:
        file: in the directory of the data set.
        what: of the file cannot be read.
        kind: of error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            said = error.strerror
        elif isinstance(error, ValueError | RuntimeError | OSError):
            said = str(error)
        else:
            said = f"{type(error).__name__}: {error}"
        problem = f"{what} cannot be read ({' '.join(said.split())[:200]})".lstrip()
        remedy = f"delete {file.parent} and prepare the data again"
        if isinstance(error, PermissionError):
            remedy = "make it readable"
        raise kind(str(file), problem, remedy) from None


def read_builder(directory: Path) -> Any:
    """The TFDS builder of a prepared data set.

    Raises:
        ConfigError: a file that describes the data set is damaged or missing.
    """
    with reading(directory / _INFO):
        dataset_info.read_proto_from_builder_dir(directory)
    if (directory / CLASS_NAMES).is_file():
        with reading(directory / CLASS_NAMES):
            (directory / CLASS_NAMES).read_bytes().decode()
    # Of a type that NumPy does not know it prints that TensorFlow is missing.
    with reading(directory / _FEATURES), contextlib.redirect_stdout(io.StringIO()):
        tfds.features.FeaturesDict.from_config(str(directory))
    with reading(directory / _INFO):
        builder: Any = tfds.builder_from_directory(directory)
        for split in builder.info.splits.values():
            if min(split.shard_lengths, default=0) < 0:
                raise ValueError(f"a negative number of records in {split.name}")
    return builder


def read_metadata(directory: Path) -> dict[str, Any]:
    """What `ghm-jax data prepare` notes of a data set: `category_ids` in label order, `sources`
    (what each split was made from), `like_corners` (names of splits). Empty for one of TFDS itself.

    Raises:
        ConfigError: the file is damaged.
    """
    file = directory / _METADATA
    if not file.exists():
        return {}
    with reading(file):
        found = parse_json(file.read_bytes())
        for name, kind in (("category_ids", list), ("sources", dict), ("like_corners", list)):
            if not isinstance(found, dict) or not isinstance(found.get(name, kind()), kind):
                raise ValueError(f"{name} is not a {kind.__name__}")
        if not all(isinstance(source, dict) for source in found.get("sources", {}).values()):
            raise ValueError("sources has something else than objects")
        if "category_ids" in found:
            found["category_ids"] = [_category_id(value) for value in found["category_ids"]]
    return found


def _category_id(value: Any) -> int:
    try:
        return CATEGORY["id"].read(value)
    except ValueError:
        raise ValueError(f"category_ids must be {CATEGORY['id'].rule} each") from None


def read_folder(directory: Path, split: str) -> Path | None:
    """The folder that the images of a split were prepared from; None if that is not recorded, or
    damaged: nothing but a check needs it."""
    try:
        folder = parse_json((directory / FOLDERS).read_bytes())[split]
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return Path(folder) if isinstance(folder, str) and "\0" not in folder else None


class Records(Sequence[dict[str, Any]]):
    """The records of a split by index, in the schema of its features; images are encoded bytes."""

    def __init__(self, builder: Any, directory: Path, split: str) -> None:
        """Opens every shard of the split.

        Args:
            builder: of the data set.
            directory: of the data set.
            split: or a slice of one, which exists.

        Raises:
            ConfigError: a shard is damaged, missing, or holds another number of records.
        """
        with reading(directory / _INFO):
            shards = builder.info.splits[split].file_instructions
            self._source = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        with ThreadPoolExecutor() as threads:  # a mounted bucket takes its time for each
            list(threads.map(_check_shard, shards))
        self._files = [Path(shard.filename) for shard in shards]
        self._ends = list(itertools.accumulate(shard.take for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        file = self._files[bisect.bisect_right(self._ends, index)]
        with reading(file, f"record {index} of the split", DataError):
            return self._source[index]


def _check_shard(shard: Any) -> None:
    file = Path(shard.filename)
    with reading(file):
        if not file.is_file():
            raise ValueError("not a file" if file.exists() else "no such file")
        reader = ArrayRecordReader(str(file), options="readahead_buffer_size:0")
        try:
            held = reader.num_records()
        finally:
            reader.close()
        if held != shard.examples_in_shard:
            raise ValueError(f"it holds {held} records, not {shard.examples_in_shard}")

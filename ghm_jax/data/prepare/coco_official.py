"""Converts the official COCO files to the data set `coco/2017` (or `coco/2014`)."""

import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from ghm_jax.config import Data
from ghm_jax.data.dataset import describe_dataset, refuse_bucket
from ghm_jax.data.prepare.coco_folder import prepare_folder
from ghm_jax.exceptions import ArgumentError
from ghm_jax.progress import Progress, Silent

# {split: (directory of images, JSON, images that the official JSON lists)}
_FILES = {
    "2017": {
        "train": ("train2017", "instances_train2017", 118_287),
        "validation": ("val2017", "instances_val2017", 5_000),
        "test": ("test2017", "image_info_test2017", 40_670),
        "test_dev": ("test2017", "image_info_test-dev2017", 20_288),
    },
    "2014": {
        "train": ("train2014", "instances_train2014", 82_783),
        "validation": ("val2014", "instances_val2014", 40_504),
        "test": ("test2014", "image_info_test2014", 40_775),
    },
}


def prepare_coco(
    year: str,
    source: str | Path,
    out: str | Path,
    *,
    splits: Sequence[str] = (),
    subset: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Writes the data set `coco/YEAR` from the unpacked official files.

    Archives that are still in `source` are first checked against the published checksums. A file
    that lists fewer images than the official one is accepted with a warning.

    Args:
        year: 2017 or 2014.
        source: directory with train2017/, val2017/, annotations/ and so on.
        out: directory of data sets (`data.dir` of a run), or gs://BUCKET/DIR; see `prepare_folder`.
        splits: any of train, validation, test and test_dev (2017 only); empty: those of the first
            two whose images exist.
        subset: see `prepare_folder`.
        progress: receives progress updates.

    Returns:
        The directory that holds the records.

    Raises:
        ArgumentError: a missing or damaged file, an unknown split, or as of `prepare_folder`.
        DataError: as of `prepare_folder`.
    """
    refuse_bucket(ArgumentError, "source", source)
    progress, source, known = progress or Silent(), Path(source), _FILES[year]
    splits = splits or [s for s in ("train", "validation") if (source / known[s][0]).is_dir()]
    _check_splits(year, source, splits)
    _check_archives(source, progress)
    found = {
        split: (source / known[split][0], source / f"annotations/{known[split][1]}.json")
        for split in splits
    }
    target = prepare_folder(f"coco/{year}", out, found, subset=subset, progress=progress)
    info = describe_dataset(Data(name=f"coco/{year}", dir=str(out)), progress).builder.info
    for split in splits:
        official = max(1, round(subset * known[split][2]))
        if info.splits[split].num_examples != official:
            progress.say(
                f"warning: {split} has {info.splits[split].num_examples:,} images, the official "
                f"files {official:,}; results will not be comparable with published ones"
            )
    return target


def _check_splits(year: str, source: Path, splits: Sequence[str]) -> None:
    known = _FILES[year]
    if not splits:
        raise ArgumentError(
            "source",
            f"neither train{year}/ nor val{year}/ in {source}",
            "unpack the official archives there",
        )
    for split in splits:
        if split not in known:
            raise ArgumentError(
                "splits", f"coco/{year} has no {split}", f"choose from {', '.join(known)}"
            )
        if not (source / known[split][0]).is_dir():
            raise ArgumentError(
                "source",
                f"no {known[split][0]}/ in {source}",
                "unpack the official archive there",
            )


def _check_archives(source: Path, progress: Progress) -> None:
    """Compares the archives in a directory with the sizes and SHA-256 sums that TFDS records."""
    folder = importlib.resources.files("tensorflow_datasets") / "url_checksums"
    lines = (folder / "coco.txt").read_text().splitlines()
    for _, size, digest, name in (line.split() for line in lines if line):
        archive = source / name
        if not archive.is_file():
            continue
        wrong = archive.stat().st_size != int(size) or sha256(archive, progress) != digest
        if wrong:
            raise ArgumentError(
                "source",
                f"{archive} is not the official archive (its size or checksum differs)",
                "download and unpack it again, or move it away if the unpacked files are intact",
            )
        progress.close()
        progress.say(f"{name}: checksum matches")


def sha256(path: Path, progress: Progress) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest, done, block = hashlib.sha256(), 0, 1 << 26
    blocks = -(-path.stat().st_size // block)
    with path.open("rb") as file:
        while chunk := file.read(block):
            digest.update(chunk)
            done += 1
            progress.update(f"checksum {path.name}", done, blocks, {})
    return digest.hexdigest()

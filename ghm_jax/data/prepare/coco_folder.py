"""Converts a folder of images with a COCO instances file to a TFDS data set."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.splits import SplitDict

from ghm_jax.data.coco_fields import look_like_corners
from ghm_jax.data.dataset import refuse_bucket, write_array_record
from ghm_jax.data.prepare.coco_annotations import (
    AnnotatedImage,
    box_notes,
    boxes_in_images,
    check_sizes,
    read_split,
    stamp_of,
)
from ghm_jax.data.records import FOLDERS, Records, read_builder, read_metadata
from ghm_jax.data.schema import detection_features
from ghm_jax.data.staging import local_directory, stage, upload
from ghm_jax.exceptions import ArgumentError, ConfigError, DataError
from ghm_jax.progress import Progress, Silent
from ghm_jax.storage import as_path, is_bucket

Splits = Mapping[str, tuple[str | Path, str | Path]]
"""{split: (directory of its images, its instances JSON)}"""
_RECORDS = "*.array_record-*"


def prepare_folder(
    name: str,
    out: str | Path,
    splits: Splits,
    *,
    subset: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Writes a TFDS data set (array_record) from images with COCO annotations.

    Everything is checked before anything is written, so that an image that is missing is not found
    after an hour of copying. Called again with the same arguments and files, it keeps what is done:
    the whole data set, or the splits that were written before the first call was stopped. The image
    files are the same if their names, sizes and modification times are, or else their contents.

    Args:
        name: of the new data set: `mine`, or with a configuration, `coco/2017`.
        out: directory of data sets (`data.dir` of a run), or gs://BUCKET/DIR: the data set is made
            in the cache of data (see `staging.local_directory`), stays there, and is uploaded.
        splits: see `Splits`; if a name begins with `test`, its annotations are optional.
        subset: fraction of the images of every split, in (0, 1]; see `read_split`.
        progress: receives progress updates.

    Returns:
        The directory that holds the records.

    Raises:
        ArgumentError: a name that cannot be used, another data set in its place, or a disk that is
            too small.
        ConfigError: the data set is there already, and damaged.
        DataError: images or annotations that cannot be used.
    """
    progress = progress or Silent()
    _check_arguments(name, splits, subset)
    place = as_path(out)
    if is_bucket(place):
        return _prepare_in_bucket(name, place, splits, subset, progress)
    categories, images = _read_splits(splits, subset)
    sources = _sources(splits, subset, images)
    target = place / name / str(CocoDirectory.VERSION)
    unfinished = target.parent / "unfinished"
    if target.parent.is_dir() and any(p != unfinished for p in target.parent.iterdir()):
        if not target.is_dir() or not _is_made_from(target, sources, images, progress):
            raise ArgumentError(
                "out",
                f"{target.parent} exists already, made from other files or another subset of them",
                "delete it or give the data set another name",
            )
        progress.close()
        progress.say(f"{target}: already prepared")
        return target
    images = _checked(images, progress)
    _check_disk(place, name, images)
    parts = _write_splits(name, unfinished, categories, images, sources, progress)
    progress.close()
    like_corners = [s for s, part in images.items() if look_like_corners(*boxes_in_images(part))]
    folders = {split: str(Path(directory).absolute()) for split, (directory, _) in splits.items()}
    _join_parts(parts, sources, like_corners, folders, target)
    shutil.rmtree(unfinished)
    return target


def _prepare_in_bucket(
    name: str, place: Path, splits: Splits, subset: float, progress: Progress
) -> Path:
    """Makes a data set in the cache and uploads it; one that is in the bucket is compared first."""
    target = place / name / str(CocoDirectory.VERSION)
    if (target / "features.json").is_file():
        stage(target, "", lambda name: True, progress)
    local = local_directory(place)
    made = prepare_folder(name, local, splits, subset=subset, progress=progress)
    upload(made, target, progress)
    return target


def _write_splits(
    name: str,
    unfinished: Path,
    categories: Mapping[int, str],
    images: Mapping[str, list[AnnotatedImage]],
    sources: Mapping[str, Any],
    progress: Progress,
) -> list[Path]:
    """Writes every split as a separate data set; those that are there already are kept."""
    parts = []
    for split, of_split in images.items():
        directory = unfinished / split
        part = directory / name / str(CocoDirectory.VERSION)
        parts.append(part)
        source, files = {split: sources[split]}, {split: of_split}
        with contextlib.suppress(ConfigError, DataError):  # damaged: written again
            if any(part.glob(_RECORDS)) and _is_made_from(part, source, files, progress):
                progress.say(f"{split}: already written")
                continue
        shutil.rmtree(directory, ignore_errors=True)
        write_array_record(
            CocoDirectory(
                name=name,
                categories=categories,
                images=files,
                data_dir=directory,
                sources=source,
                progress=progress,
            )
        )
    return parts


class CocoDirectory(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder over images and their COCO annotations.

    Boxes are clipped to the image; images without boxes and crowd regions are kept. The original
    category ids are in the metadata as `category_ids`, in label order.

    Args:
        name: see `prepare_folder`.
        categories: {category id: name} in label order.
        images: {split: its images}.
        data_dir: directory of data sets.
        sources: what the data set is made from, saved in the metadata.
        progress: receives an update per image.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def __init__(
        self,
        *,
        name: str,
        categories: Mapping[int, str],
        images: Mapping[str, list[AnnotatedImage]],
        data_dir: str | Path,
        sources: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ):
        self._categories, self._images = categories, images
        self._sources, self._progress = dict(sources or {}), progress or Silent()
        # In TFDS a class has one name; here each folder is a separate data set.
        self.name, _, config = name.partition("/")  # pyright: ignore[reportAttributeAccessIssue]
        # TFDS warns about configurations that it does not know, which includes all of these.
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)
        try:
            super().__init__(
                data_dir=data_dir, config=tfds.core.BuilderConfig(name=config) if config else None
            )
        finally:
            logging.set_verbosity(verbosity)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with boxes, from files in COCO form.",
            features=detection_features(list(self._categories.values())),
            metadata=tfds.core.MetadataDict(
                category_ids=list(self._categories), sources=self._sources
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self._images}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keyed by file name as in TFDS `coco`, so that the records have the same order."""
        labels = {category_id: label for label, category_id in enumerate(self._categories)}
        images = self._images[split]
        for done, image in enumerate(images, start=1):
            objects = [
                {
                    "id": annotation["id"],
                    "area": int(annotation["area"]),
                    "bbox": _relative_box(annotation["bbox"], image.width, image.height),
                    "label": labels[annotation["category_id"]],
                    "is_crowd": annotation["iscrowd"],
                }
                for annotation in image.annotations
            ]
            yield (
                image.file_name,
                {
                    "image": image.path.read_bytes(),
                    "image/filename": image.file_name,
                    "image/id": image.id,
                    "objects": objects,
                },
            )
            self._progress.update(f"write {split}", done, len(images), {})


def _check_arguments(name: str, splits: Splits, subset: float) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*(/\w[\w.-]*)?", name):
        raise ArgumentError(
            "name",
            f"{name!r} cannot be the name of a data set",
            "use lower-case letters, digits and _, beginning with a letter",
        )
    if not splits:
        raise ArgumentError("splits", "empty", "give at least one, with images and annotations")
    for split, paths in splits.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
            raise ArgumentError(
                "splits",
                f"{split} cannot be the name of a split",
                "use lower-case letters, digits and _",
            )
        for path in paths:
            refuse_bucket(DataError, split, path)
    if not 0 < subset <= 1:
        raise ArgumentError(
            "subset", f"must be more than 0% and at most 100%, got {100 * subset:g}%"
        )


def _sources(
    splits: Splits, subset: float, images: Mapping[str, list[AnnotatedImage]]
) -> dict[str, dict[str, Any]]:
    """What tells the files of every split from others."""
    return {
        split: {
            "annotations": hashlib.sha256(Path(annotations).read_bytes()).hexdigest(),
            "subset": subset,
            "images": stamp_of(split, images[split]),
        }
        for split, (_, annotations) in splits.items()
    }


def _is_made_from(
    prepared: Path,
    sources: Mapping[str, Any],
    images: Mapping[str, list[AnnotatedImage]],
    progress: Progress,
) -> bool:
    """Whether a prepared data set was made from these sources. The contents of the image files are
    compared only where the modification times differ, as those of a copy do.

    Raises:
        ConfigError, DataError: the prepared data set is damaged.
    """
    builder, found = read_builder(prepared), read_metadata(prepared).get("sources", {})
    if set(builder.info.splits) != set(sources):
        return False
    if found == sources:
        return True

    def of_annotations(sources: Mapping[str, Any]) -> dict[str, Any]:
        return {split: {**source, "images": ""} for split, source in sources.items()}

    if of_annotations(found) != of_annotations(sources):
        return False
    for split, of_split in images.items():
        paths = {image.file_name: image.path for image in of_split}
        for done, record in enumerate(Records(builder, prepared, split), start=1):
            if paths[record["image/filename"].decode()].read_bytes() != record["image"]:
                return False
            progress.update(f"compare {split}", done, len(of_split), {})
    return True


def _read_splits(
    splits: Splits, subset: float
) -> tuple[dict[int, str], dict[str, list[AnnotatedImage]]]:
    categories: dict[int, str] = {}
    images: dict[str, list[AnnotatedImage]] = {}
    for split, (directory, annotations) in splits.items():
        found, images[split] = read_split(split, Path(directory), Path(annotations), subset=subset)
        if categories and found != categories:
            raise DataError(
                split,
                f"the categories differ from those of {next(iter(images))}",
                "give both files the same ids and names",
            )
        categories = found
    return categories, images


def _checked(
    images: Mapping[str, list[AnnotatedImage]], progress: Progress
) -> dict[str, list[AnnotatedImage]]:
    """The images with the sizes of their files, after warnings about their boxes."""
    checked = {split: check_sizes(split, part, progress) for split, part in images.items()}
    for split, part in checked.items():
        for note in box_notes(part):
            progress.say(f"warning: {split}: {note}")
    return checked


def _check_disk(out: Path, name: str, images: Mapping[str, list[AnnotatedImage]]) -> None:
    sizes = [sum(image.path.stat().st_size for image in part) for part in images.values()]
    # TFDS sorts the records of a split in temporary files if they exceed a gigabyte.
    needed = sum(sizes) + max((size for size in sizes if size > 2**30), default=0)
    needed += needed // 20 + 2**20
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ArgumentError(
            "out",
            f"{name} needs {needed / 1e9:.1f} GB in {out}, where {free / 1e9:.1f} GB are free",
            "free some space, choose another directory or prepare a `subset`",
        )


def _join_parts(
    parts: list[Path],
    sources: Mapping[str, Any],
    like_corners: list[str],
    folders: Mapping[str, str],
    target: Path,
) -> None:
    """Moves the records of one-split data sets into one data set, which appears when complete. Its
    metadata names the splits whose boxes look like corners: clipped boxes do not show it."""
    whole = parts[0].parent / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    infos: list[Any] = [tfds.builder_from_directory(part).info for part in parts]
    for part in parts:
        for file in part.glob(_RECORDS):
            file.rename(whole / file.name)
    info = infos[0]
    info.set_splits(SplitDict([split for each in infos for split in each.splits.values()]))
    info.metadata["sources"] = dict(sources)
    if like_corners:
        info.metadata["like_corners"] = like_corners
    info.write_to_directory(whole)
    (whole / FOLDERS).write_text(json.dumps(folders))
    whole.rename(target)


def _relative_box(bbox: list[float], width: int, height: int) -> tfds.features.BBox:
    x, y, w, h = bbox
    return tfds.features.BBox(
        ymin=min(max(y / height, 0.0), 1.0),
        xmin=min(max(x / width, 0.0), 1.0),
        ymax=min(max((y + h) / height, 0.0), 1.0),
        xmax=min(max((x + w) / width, 0.0), 1.0),
    )

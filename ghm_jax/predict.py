"""Detections on image files: drawn on the images, as JSON, and on one contact sheet."""

import contextlib
import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ghm_jax.config import Config, Data
from ghm_jax.data.batching import Example, collate, filler_example
from ghm_jax.data.order import Groups, group_images, reading_order
from ghm_jax.data.placement import choose_placement
from ghm_jax.data.transforms import IMAGE_SUFFIXES, decode_image, encoded_size, is_turned
from ghm_jax.detection.nms import Detections
from ghm_jax.distributed.devices import choose_devices, replicate
from ghm_jax.evaluation.detector import Detector, category_ids_of_run, coco_results, restore_state
from ghm_jax.exceptions import ArgumentError, DataError, UserError
from ghm_jax.plots.drawing import contact_sheet, draw_boxes
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.directory import load_run
from ghm_jax.storage import unused_directory, why_not_writable

SHEET_IMAGES = 24
"""Maximum number of images on the contact sheet: the first ones."""
_SHEET_SIDE = 480  # long side of an image there, in pixels
_SHORTEST, _LONGEST = 480, 1600  # long side of a drawn image, in pixels


class Prediction(NamedTuple):
    """What `predict` did."""

    images: int
    """Images with detections drawn on them."""
    detections: int
    unreadable: tuple[str, ...]
    """Files that cannot be read as images, with the reason."""
    not_images: tuple[Path, ...]
    """Files in the folders, not hidden, that do not have an ending of `IMAGE_SUFFIXES`."""
    turned: int
    """Images whose orientation tag is not applied."""


class _Found(NamedTuple):
    """One image and its detections."""

    number: int
    """Of the file, from 0."""
    image: np.ndarray
    """u8[H, W, 3], RGB, as stored."""
    detections: Detections
    """[D], boxes in pixels of the stored image."""


@dataclasses.dataclass(frozen=True)
class _Task:
    """What to detect, on which files."""

    config: Config
    files: list[Path]
    sizes: dict[int, tuple[int, int]]
    """(height, width) of each readable file, by its number."""
    unreadable: dict[int, str]
    """Files that cannot be read as images, with the reason; grows while images are decoded."""
    progress: Progress


def predict(
    run_dir: str | Path,
    sources: Sequence[str],
    out: str | Path,
    *,
    batch_size: int = 0,
    threshold: float = 0.3,
    data_dir: str | None = None,
    progress: Progress | None = None,
) -> Prediction:
    """Detects objects on image files with the newest checkpoint of a run.

    Writes into `out`: every image with its detections under its own name, `predictions.json` (COCO
    results with `file_name`; boxes in pixels of the stored image; `image_id` is the number that
    the file is named by, as COCO's are, or else its position from 1) and `contact_sheet.jpg` of the
    first images. Orientation tags are not applied: like training, detection sees the pixels as
    stored. Files that are not images are skipped.

    Args:
        run_dir: of a run that has a checkpoint.
        sources: image files, folders (the images directly in them) and glob patterns.
        out: a new or empty directory, so that nothing is ever overwritten.
        batch_size: images per step; 0: the run's `predict.batch_size`. Lowered if there are fewer.
        threshold: lowest score of a detection.
        data_dir: where the run's data set is now, for its category ids; None: the run's `data.dir`.
        progress: receives progress updates.

    Raises:
        UserError: no run, no checkpoint, no image that can be read, or `out` is in use or cannot be
            written to.
    """
    progress = progress or Silent()
    run, config = load_run(run_dir, data_dir=data_dir)
    files = find_images(sources)
    if not 0 <= threshold <= 1:
        raise ArgumentError("threshold", f"must be in [0, 1], got {threshold}")
    if batch_size < 0:
        raise ArgumentError("batch_size", f"must not be negative, got {batch_size}")
    out = _directory_for_output(out)
    settings = dataclasses.replace(config.predict, score_threshold=threshold)
    config = dataclasses.replace(config, predict=settings)
    devices = choose_devices(config.run.devices)
    variables = replicate(restore_state(run, config, devices[0]).variables, devices)
    sizes, unreadable = _read_sizes(files, progress)
    if not sizes:
        raise _none_readable(unreadable)
    out.mkdir(parents=True, exist_ok=True)
    category_ids = category_ids_of_run(config.data, progress)
    detector = Detector(config, len(config.data.classes), devices)
    task = _Task(config, files, sizes, unreadable, progress)
    found = _detect(task, detector, variables, batch_size, len(devices))
    rows = _write_results(task, found, out, category_ids)
    progress.close()
    if not rows:
        raise _none_readable(unreadable)
    in_order = [row for number in sorted(rows) for row in rows[number]]
    _write(out / "predictions.json", json.dumps(in_order).encode())
    return _summary(task, sources, rows)


def _directory_for_output(out: str | Path) -> Path:
    out = unused_directory(out)
    if why := why_not_writable(out / "predictions.json"):
        raise ArgumentError("out", f"{out} cannot be written ({why})", "choose another directory")
    return out


def _detect(
    task: _Task, detector: Detector, variables: dict[str, Any], batch_size: int, devices: int
) -> Iterator[_Found]:
    """The detections of each image, one bucket after the other."""
    config, done = task.config, 0
    groups = _group(task.sizes, config.data)
    size = min(batch_size or config.predict.batch_size, max(map(len, groups.values())))
    size = -(-size // devices) * devices  # the same number on every device
    for bucket, numbers in reading_order(groups, size):
        images = {}
        for number in numbers:
            try:
                images[number] = decode_image(task.files[number].read_bytes())
            except (OSError, ValueError, cv2.error) as error:
                task.unreadable[number] = f"{task.files[number]}: {error}"
        examples = [_example(image, config.data) for image in images.values()]
        examples += [filler_example()] * (size - len(examples))
        found = detector(variables, collate(examples, bucket, config.data.max_boxes))
        for i, (number, image) in enumerate(images.items()):
            yield _Found(number, image, Detections(*(array[i] for array in found)))
        done += len(numbers)
        task.progress.update("predict", done, len(task.sizes), {})


def _write_results(
    task: _Task, found: Iterator[_Found], out: Path, category_ids: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """Draws every image as it comes, and the contact sheet; COCO results by number of the file."""
    ids, names = _image_ids(task.files), _output_names(task.files)
    rows, sheet = {}, {}
    for number, image, detections in found:
        of_file = coco_results(ids[number], detections, category_ids)
        rows[number] = [{**row, "file_name": str(task.files[number])} for row in of_file]
        drawn = _draw(image, detections, task.config, _drawing_scale(image))
        _write_image(out / names[number], drawn)
        # Drawn again: class names on a large image would be too small to read here.
        small = _draw(image, detections, task.config, _SHEET_SIDE / max(image.shape[:2]))
        sheet[number] = small, f"{task.files[number].name}: {len(of_file)}"
        if len(sheet) > SHEET_IMAGES:
            del sheet[max(sheet)]
    if sheet:
        small = [sheet[number] for number in sorted(sheet)]
        _write_image(out / "contact_sheet.jpg", contact_sheet(small, side=_SHEET_SIDE))
    return rows


def _summary(
    task: _Task, sources: Sequence[str], rows: dict[int, list[dict[str, Any]]]
) -> Prediction:
    """`rows`: COCO results by number of the file."""
    return Prediction(
        images=len(rows),
        detections=sum(map(len, rows.values())),
        unreadable=tuple(task.unreadable[number] for number in sorted(task.unreadable)),
        not_images=tuple(_not_images(sources, task.files)),
        turned=sum(_is_turned(task.files[number]) for number in rows),
    )


def find_images(sources: Sequence[str]) -> list[Path]:
    """The files that files, folders and glob patterns name, each once: by its own name rather than
    by a link to it. Of a folder those that have an ending of `IMAGE_SUFFIXES`.

    Raises:
        UserError: one of them names none.
    """
    files: dict[str, Path] = {}  # by what a link leads to
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = [p for p in _files_in(path) if p.suffix.lower() in IMAGE_SUFFIXES]
        elif path.exists():
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(source, recursive=True))]
            found = [p for p in found if p.is_file()]
        if not found:
            what = f"no image ({', '.join(IMAGE_SUFFIXES)})" if path.is_dir() else "no such file"
            raise UserError(source, what, "give image files, folders or glob patterns")
        for p in found:
            known = files.setdefault(os.path.realpath(p), p)
            if known.is_symlink() and not p.is_symlink():
                files[os.path.realpath(p)] = p
    if not files:
        raise UserError("images", "none given", "give image files, folders or glob patterns")
    return list(files.values())


def _files_in(folder: Path) -> list[Path]:
    """All but hidden ones; also links that lead nowhere, which are then said to be unreadable."""
    try:
        return sorted(p for p in folder.iterdir() if not (p.name.startswith(".") or p.is_dir()))
    except OSError as error:
        raise UserError(str(folder), f"cannot be read ({error.strerror})") from error


def _not_images(sources: Sequence[str], files: Sequence[Path]) -> list[Path]:
    """The files in the folders that are not among `files`, by whatever name."""
    folders = dict.fromkeys(Path(source) for source in sources if Path(source).is_dir())
    taken = {os.path.realpath(path) for path in files}
    found = [path for folder in folders for path in _files_in(folder)]
    return [path for path in found if os.path.realpath(path) not in taken]


def _is_turned(path: Path) -> bool:
    try:
        return is_turned(path)
    except ValueError:  # its pixels were read, but its tags cannot be
        return False


def _image_ids(files: Sequence[Path]) -> list[int]:
    stems = [path.stem for path in files]
    if all(s.isascii() and s.isdigit() for s in stems) and len(set(map(int, stems))) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(files) + 1))


def _output_names(files: Sequence[Path]) -> list[str]:
    """File names that differ, also on case-insensitive file systems; PNG stays PNG."""
    taken, names = {"contact_sheet.jpg", "predictions.json"}, []
    for path in files:
        suffix = ".png" if path.suffix.lower() == ".png" else ".jpg"
        name, number = path.stem + suffix, 2
        while name.lower() in taken:
            name, number = f"{path.stem}-{number}{suffix}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def _read_sizes(
    files: Sequence[Path], progress: Progress
) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """(height, width) of each file by its number; for files that are not images, the reason."""
    sizes, unreadable = {}, {}
    for number, path in enumerate(files):
        try:
            sizes[number] = encoded_size(path)
        except ValueError as error:
            unreadable[number] = f"{path}: {error}"
        progress.update("read sizes", number + 1, len(files), {})
    return sizes, unreadable


def _none_readable(unreadable: dict[int, str]) -> DataError:
    first = unreadable[min(unreadable)]
    return DataError("images", f"none of {len(unreadable)} files can be read as an image: {first}")


def _group(sizes: dict[int, tuple[int, int]], data: Data) -> Groups:
    """File numbers by bucket.

    A run may have buckets for one orientation only, and the files the other: a square bucket with
    the longest side, which `data.long_side` never exceeds, takes what fits in no other bucket.
    """
    largest = max(max(bucket) for bucket in data.buckets)
    buckets = tuple(dict.fromkeys([*data.buckets, (largest, largest)]))
    by_number = np.zeros((max(sizes) + 1, 2), np.int32)
    by_number[list(sizes)] = list(sizes.values())
    return group_images(
        by_number, np.array(list(sizes)), dataclasses.replace(data, buckets=buckets)
    )


def _example(image: np.ndarray, data: Data) -> Example:
    placement = choose_placement(image.shape[:2], data, None)
    placed = placement.place_image(image)
    return Example(placed, scale=placement.scale, offset=placement.offset, valid=True)


def _drawing_scale(image: np.ndarray) -> float:
    """Not so small that class names cover everything, and not larger than a screen."""
    side = max(image.shape[:2])
    return max(1, _SHORTEST // side) if side < _LONGEST else _LONGEST / side


def _draw(image: np.ndarray, found: Detections, config: Config, scale: float) -> np.ndarray:
    used = np.asarray(found.labels) >= 0
    boxes, scores, labels = (np.asarray(array)[used] for array in found)
    return draw_boxes(image, boxes, labels, config.data.classes, scores, scale=scale)


def _write_image(path: Path, image: np.ndarray) -> None:
    _write(path, cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())


def _write(path: Path, content: bytes) -> None:
    """Writes a complete file or nothing."""
    try:
        path.write_bytes(content)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise ArgumentError("out", f"{path} cannot be written ({error.strerror})") from error

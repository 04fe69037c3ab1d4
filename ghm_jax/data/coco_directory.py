"""Any folder of images with a COCO instances file becomes a TFDS data set of the one schema."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from ghm_jax.config import ConfigError
from ghm_jax.data.coco_annotations import AnnotatedImage, read_split
from ghm_jax.data.dataset import write_array_record
from ghm_jax.data.schema import detection_features

Splits = Mapping[str, tuple[str | Path, str | Path]]
"""{split: (directory of its images, its instances JSON)}"""


def prepare_folder(name: str, out: str | Path, splits: Splits) -> Path:
    """Writes a TFDS data set (array_record) from images with COCO annotations.

    Everything is checked before anything is written: a picture found missing after an hour of
    copying helps nobody.

    Args:
        name: of the new data set: `mine`, or with a configuration, `coco/2017`.
        out: directory of data sets (`data.dir` of a run).
        splits: see `Splits`.

    Returns:
        The directory that holds the records.

    Raises:
        ConfigError: the data set is already there, or its source cannot be used.
    """
    existing = Path(out) / name
    if existing.is_dir() and any(existing.iterdir()):
        raise ConfigError(
            f"out: {existing} is already there; delete it or give the data set another name"
        )
    builder = CocoDirectory(name=name, splits=splits, data_dir=out)
    write_array_record(builder)
    return Path(builder.data_path)


class CocoDirectory(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder over folders of images and their COCO instances files.

    Boxes are clipped to the image; images without boxes and crowd regions are kept. The original
    category ids are in the metadata as `category_ids`, in label order.

    Args:
        name: see `prepare_folder`.
        splits: see `Splits`.
        data_dir: directory of data sets.

    Raises:
        ConfigError: a missing file, or annotations that are not COCO's or do not fit the images.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def __init__(self, *, name: str, splits: Splits, data_dir: str | Path):
        if not re.fullmatch(r"[a-z][a-z0-9_]*(/\w[\w.-]*)?", name):
            raise ConfigError(
                f"name: {name!r} cannot name a data set; "
                "use small letters, digits and _, beginning with a letter"
            )
        if not splits:
            raise ConfigError("splits: needs at least one split with images and annotations")
        self._categories: dict[int, str] = {}
        self._images: dict[str, list[AnnotatedImage]] = {}
        for split, (directory, annotations) in splits.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
                raise ConfigError(f"{split}: cannot name a split; use small letters, digits and _")
            categories, images = read_split(split, Path(directory), Path(annotations))
            if self._images and categories != self._categories:
                raise ConfigError(
                    f"{split}: the categories differ from those of {next(iter(self._images))}; "
                    "give both files the same ids and names"
                )
            self._categories, self._images[split] = categories, images
        # A class has one name in TFDS; each folder is a data set of its own.
        self.name, _, config = name.partition("/")  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(
            data_dir=data_dir, config=tfds.core.BuilderConfig(name=config) if config else None
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with boxes, from files in COCO form.",
            features=detection_features(list(self._categories.values())),
            metadata=tfds.core.MetadataDict(category_ids=list(self._categories)),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(images) for split, images in self._images.items()}

    def _generate_examples(
        self, images: list[AnnotatedImage]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        labels = {category_id: label for label, category_id in enumerate(self._categories)}
        for image in images:
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
                image.id,
                {
                    "image": image.path.read_bytes(),
                    "image/filename": image.file_name,
                    "image/id": image.id,
                    "objects": objects,
                },
            )


def _relative_box(bbox: list[float], width: int, height: int) -> tfds.features.BBox:
    x, y, w, h = bbox
    return tfds.features.BBox(
        ymin=min(max(y / height, 0.0), 1.0),
        xmin=min(max(x / width, 0.0), 1.0),
        ymax=min(max((y + h) / height, 0.0), 1.0),
        xmax=min(max((x + w) / width, 0.0), 1.0),
    )

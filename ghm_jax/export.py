"""Exports a run's detector for other programs: its weights, or the detector as one program."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors.numpy

from ghm_jax.batch import ModelInputs
from ghm_jax.config import Config
from ghm_jax.detection.outputs import predict_step
from ghm_jax.distributed.devices import choose_devices
from ghm_jax.evaluation.detector import category_ids_of_run, restore_state
from ghm_jax.exceptions import ArgumentError, ConfigError
from ghm_jax.models.weight_conversion import export_detector
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.storage import as_path, is_bucket, why_not_writable, write_text
from ghm_jax.training.build import make_model

PLATFORMS = ("cpu", "cuda", "tpu")
"""What one program can run on, all of them at once."""

_INPUTS = {
    "images": "uint8[batch, height, width, 3], RGB, scaled as below, each in the top left corner; "
    "pixels beyond its image_size are ignored",
    "image_size": "int32[batch, 2], height and width of each image inside its padding",
}
_OUTPUTS = {
    "boxes": "float32[batch, detections, 4], x0, y0, x1, y1 in pixels of the input",
    "scores": "float32[batch, detections], descending",
    "labels": "int32[batch, detections], indices into classes and category_ids; -1 in unused rows",
    "valid": "bool[batch, detections], false in unused rows",
}


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    platforms: Sequence[str] | None = None,
    data_dir: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes the newest checkpoint of a run; the suffix of `out` chooses the format.

    .safetensors: the weights in torchvision's names, with the class names (a JSON list) in the
    metadata `classes`. `ghm-jax import` reads them as well.

    .stablehlo: the detector from uint8 images to detections, with its weights and the suppression,
    as `jax.export` serializes it. `jax.export.deserialize(bytearray(data)).call(images,
    image_size)` gives a dict of boxes, scores, labels and valid without this package. What a caller
    must know is stored next to it as JSON: inputs, outputs, scaling, class names, category ids.

    Args:
        run_dir: of a run that has a checkpoint.
        out: the file; an old one is replaced when the new one is complete.
        batch_size: .stablehlo: images per call (1).
        size: .stablehlo: padded (height, width) of the images, multiples of 32 (the run's first
            bucket).
        platforms: .stablehlo: where it can run, of `PLATFORMS` (all of them).
        data_dir: .stablehlo: where the run's data set is now, for its category ids (the run's
            `data.dir`).
        progress: receives progress updates.

    Returns:
        The files.

    Raises:
        UserError: no run, no checkpoint, an unknown suffix, a network that torchvision lacks
            (.safetensors), or a shape that cannot be (.stablehlo).
    """
    out = as_path(out)
    _check(out, batch_size=batch_size, size=size, platforms=platforms)
    run, config = load_run(run_dir, data_dir=data_dir)
    files, notes = [out], None
    if out.suffix == ".safetensors":
        data = _weights(run, config)
    else:
        files.append(out.with_name(out.name + ".json"))
        data, notes = _program(
            run,
            config,
            batch_size=1 if batch_size is None else batch_size,
            size=size or config.data.buckets[0],
            platforms=PLATFORMS if platforms is None else tuple(dict.fromkeys(platforms)),
            progress=progress or Silent(),
        )
    _write(out, data, notes)
    return files


def _check(out: Path, **shape: Any) -> None:
    """Raises ArgumentError where the arguments of `export` cannot work together."""
    given = [name for name, value in shape.items() if value is not None]
    if out.suffix not in (".safetensors", ".stablehlo"):
        raise ArgumentError("out", f"{out} does not end in .safetensors or .stablehlo")
    if out.suffix == ".safetensors" and given:
        raise ArgumentError(given[0], f"{out} holds weights only", "omit it, or use .stablehlo")
    if not is_bucket(out) and not out.parent.is_dir():
        raise ArgumentError("out", f"no directory {out.parent}", "create it first")
    notes = [out.with_name(out.name + ".json")] if out.suffix == ".stablehlo" else []
    if why := why_not_writable(out, *notes):
        raise ArgumentError("out", f"{out} cannot be written ({why})", "choose another file")
    batch_size, size, platforms = shape["batch_size"], shape["size"], shape["platforms"]
    if batch_size is not None and batch_size < 1:
        raise ArgumentError("batch_size", f"must be positive, got {batch_size}")
    if size is not None and any(side < 32 or side % 32 for side in size):
        raise ArgumentError("size", f"{size} is not a height and width in multiples of 32")
    if platforms is not None and not (platforms and set(platforms) <= set(PLATFORMS)):
        choices = ", ".join(PLATFORMS)
        raise ArgumentError("platforms", f"got {tuple(platforms)}", f"choose from {choices}")


def _write(out: Path, data: bytes, notes: dict[str, Any] | None) -> None:
    """Writes the file, and the notes next to it; an old file stays until the new one is ready."""
    scratch = out.with_name(out.name + ".part")
    try:
        scratch.write_bytes(data)
        if notes:
            write_text(out.with_name(out.name + ".json"), json.dumps(notes, indent=2) + "\n")
        scratch.replace(out)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ArgumentError("out", f"{out} cannot be written ({error.strerror})") from error


def _weights(run: RunDirectory, config: Config) -> bytes:
    state = restore_state(run, config, choose_devices(1)[0])
    try:
        tensors = export_detector(state.variables)
    except ValueError as error:
        raise ConfigError(
            str(run.path), f"cannot be exported as .safetensors: {error}", "use .stablehlo"
        ) from error
    return safetensors.numpy.save(tensors, {"classes": json.dumps(config.data.classes)})


def _program(
    run: RunDirectory,
    config: Config,
    *,
    batch_size: int,
    size: tuple[int, int],
    platforms: tuple[str, ...],
    progress: Progress,
) -> tuple[bytes, dict[str, Any]]:
    """The serialized program, and what a caller must know."""
    state = restore_state(run, config, choose_devices(1)[0])
    model = make_model(config, len(config.data.classes))

    # The weights are constants of the program: one file that cannot be paired with a wrong one.
    def detect(images: jax.Array, image_size: jax.Array) -> dict[str, jax.Array]:
        inputs = ModelInputs(images, image_size)
        found = predict_step(state.variables, inputs, config=config, model=model)
        return {**found._asdict(), "valid": found.labels >= 0}

    program = jax.export.export(jax.jit(detect), platforms=platforms)(
        jax.ShapeDtypeStruct((batch_size, *size, 3), np.uint8),
        jax.ShapeDtypeStruct((batch_size, 2), np.int32),
    )
    notes = {
        "inputs": _INPUTS,
        "outputs": _OUTPUTS,
        "batch": batch_size,
        "height": size[0],
        "width": size[1],
        "detections": config.predict.max_detections,
        "scaling": {
            "short_side": config.data.short_side,
            "long_side": config.data.long_side,
            "rule": "the short side has short_side pixels, unless the long side would have more "
            "than long_side; bilinear",
        },
        "score_threshold": config.predict.score_threshold,
        "classes": config.data.classes,
        "category_ids": category_ids_of_run(config.data, progress),
        "platforms": program.platforms,
        "step": int(state.step),
        "jax": jax.__version__,
    }
    return bytes(program.serialize()), notes

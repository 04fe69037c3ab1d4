"""Checks that a machine has what training needs.

Every check gives findings and never raises: an error during a check is a finding as well.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ghm_jax.analysis.doctor.data import examine_data
from ghm_jax.analysis.doctor.finding import Finding, guarded
from ghm_jax.analysis.doctor.run import examine_directory, examine_weights
from ghm_jax.analysis.doctor.store import examine_bucket
from ghm_jax.config import Config
from ghm_jax.data.staging import local_directory
from ghm_jax.runs.directory import RunDirectory
from ghm_jax.storage import as_path, is_bucket

_NEEDED_BYTES = 2_000_000_000  # checkpoints of an R50 run, with a margin


def examine(
    config: Config,
    source: str = "",
    *,
    data_given: bool = False,
    images: int = 2000,
    encoding: str = "utf-8",
) -> Iterator[Finding]:
    """Checks this machine and the data of a config, one finding after the other.

    Nothing is written, except an object into a bucket that is deleted again and the copy of data in
    a bucket, and no data set is built.

    Args:
        config: of an experiment or a run, or any with `data.dir` set.
        source: the run or experiment that the config is from, or a place in a bucket for runs;
            empty: none, and all data sets in `data.dir` are checked.
        data_given: missing data is a fault, even without a `source`.
        images: most records to read per split.
        encoding: of the terminal.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("devices", _devices),
        ("decoders", _decoders),
        ("evaluators", _evaluators),
        ("disk", lambda: _disk(config)),
        ("memory", lambda: _shared_memory(config)),
    ]
    place = as_path(source) if source else Path()
    if is_bucket(place):
        checks.append(("bucket", lambda: examine_bucket(place)))
        source = source if RunDirectory(place).config.is_file() else ""
    if source:
        checks.append(("settings", lambda: _settings(config, source)))
        if place.is_dir():
            checks.append(("run", lambda: examine_directory(place, config)))
        else:
            checks.append(("weights", lambda: examine_weights(config)))
    needed = data_given or bool(source)
    checks.append(("data", lambda: examine_data(config, bool(source), needed, images, encoding)))
    for what, check in checks:
        yield from guarded(what, check)


def _python() -> Iterator[Finding]:
    said = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    supported = sys.version_info[:2] >= (3, 11)
    yield Finding("python", supported, said, "" if supported else "use Python 3.11 to 3.13")


def _packages() -> Iterator[Finding]:
    wanted = [Requirement(text) for text in metadata.requires("ghm-jax") or ()]
    fit, shown = 0, []
    for requirement in wanted:
        if requirement.name == "ghm-jax":
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": "detector"}):
            continue
        install = f'pip install "{requirement.name}{requirement.specifier}"'
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", False, f"{requirement.name} is missing", install)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fit += 1
            if requirement.name in ("jax", "flax", "optax", "grain", "hotcoco"):
                shown.append(f"{requirement.name} {version}")
        else:
            said = f"{requirement.name} {version} is not {requirement.specifier}"
            yield Finding("packages", False, said, install)
    versions = ", ".join([f"ghm-jax {metadata.version('ghm-jax')}", *shown])
    yield Finding("packages", True, f"{fit} fit: {versions}")


def _devices() -> Iterator[Finding]:
    import jax.numpy as jnp

    from ghm_jax.distributed.devices import choose_devices

    devices = choose_devices(0)
    total = float(jnp.ones((64, 64)).sum())
    kind = " ".join(dict.fromkeys((devices[0].platform, devices[0].device_kind)))
    cores = f", {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    works = total == 64 * 64
    said = f"{len(devices)} x {kind}{cores}" if works else f"{kind} computes a wrong sum ({total})"
    yield Finding("devices", works, said, "" if works else "reinstall jax and its driver")
    if devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        for path, name, extra in (
            ("/dev/nvidia0", "an NVIDIA GPU", "jax[cuda12]"),
            ("/dev/accel0", "a TPU", "jax[tpu]"),
        ):
            if Path(path).exists():
                install = f'pip install -U "{extra}"'
                yield Finding("devices", False, f"JAX does not use {name} that is here", install)


def _decoders() -> Iterator[Finding]:
    import cv2
    import numpy as np

    from ghm_jax.data.transforms import decode_image, encoded_size

    ramp = np.arange(48 * 32, dtype=np.float64).reshape(48, 32) / (48 * 32) * 200
    image = np.stack([ramp, 255 - ramp, 0 * ramp + 90], axis=-1).astype(np.uint8)  # RGB
    for ending, tolerance in ((".jpg", 16), (".png", 0)):
        encoded = cv2.imencode(ending, image[..., ::-1])[1].tobytes()
        error = int(np.abs(decode_image(encoded).astype(int) - image).max())
        good = error <= tolerance and encoded_size(encoded) == (48, 32)
        said = f"{ending[1:].upper()} by OpenCV {cv2.__version__}"
        said += "" if good else f" is off by {error} of 255"
        install = "pip install --force-reinstall opencv-python-headless"
        yield Finding("decoders", good, said, "" if good else install)


def _evaluators() -> Iterator[Finding]:
    from ghm_jax.evaluation.coco import score

    boxes = [[10.0, 10.0, 50.0, 40.0], [80.0, 20.0, 30.0, 60.0]]
    truth = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 7, "bbox": b, "area": 2000.0, "iscrowd": 0}
            for i, b in enumerate(boxes, start=1)
        ],
    }
    found = [
        {"image_id": 1, "category_id": 7, "bbox": [x + 4, y, w, h], "score": 0.9}
        for x, y, w, h in boxes
    ]
    one, other = (score(truth, found, name)[0] for name in ("hotcoco", "pycocotools"))
    same = all(abs(one[key] - other[key]) < 1e-6 for key in one) and 0 < one["AP"] < 1
    said = "hotcoco and pycocotools agree" if same else f"AP {one['AP']} and {other['AP']} differ"
    yield Finding("evaluators", same, said, "" if same else "reinstall hotcoco and pycocotools")


def _disk(config: Config) -> Iterator[Finding]:
    yield from _cache()
    data = as_path(config.data.dir)
    data = local_directory(data, config.data.cache) if is_bucket(data) else data
    for what, path in (("disk of runs", Path()), ("disk of data", data)):
        there = path.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        said = f"{free / 1e9:.1f} GB free at {there}" + ("" if writable else ", not writable")
        if what == "disk of data" and not writable:
            writable = path.is_dir()  # prepared data is only read
        remedy = "free some space" if free < _NEEDED_BYTES else "choose a writable directory"
        good = writable and free >= _NEEDED_BYTES
        yield Finding(what, good, said, "" if good else remedy)


def _cache() -> Iterator[Finding]:
    from ghm_jax.storage import cache_directory, why_not_writable

    cache = cache_directory("programs")
    why = "no home directory" if cache is None else why_not_writable(cache / "any")
    if why:
        said = f"compiled programs and converted weights are not kept ({why})"
        yield Finding("cache", False, said, "set HOME or GHM_JAX_CACHE to a writable directory")


def _shared_memory(config: Config) -> Iterator[Finding]:
    from ghm_jax.data.workers import check_workers, shared_memory

    size, workers = max(config.optimizer.batch_size, config.predict.batch_size), config.run.workers
    check_workers(config.data, size, workers)
    memory = shared_memory(config.data, size, workers)
    if memory is not None and workers:
        said = f"{memory.free / 1e6:.0f} MB of shared memory for {workers} workers"
        yield Finding("memory", True, said)


def _settings(config: Config, source: str) -> Iterator[Finding]:
    from ghm_jax.distributed.devices import choose_devices

    config.check()  # first: the devices are a finding of their own
    config.check(len(choose_devices(config.run.devices)))
    said = f"{source}: {config.model.backbone}, {config.loss.classification}, {config.loss.box}"
    yield Finding("settings", True, said)

"""ImageNet weights that a new run starts from: converted once, then read from the cache."""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghm_jax.config import Model
from ghm_jax.exceptions import ConfigError
from ghm_jax.models.weight_conversion import import_backbone
from ghm_jax.models.weight_files import HUB, load_weights, locate
from ghm_jax.runs.checkpoint import restore_tree, save_tree
from ghm_jax.storage import cache_directory


def load_backbone(model: Model, like: Mapping[str, Any]) -> dict[str, Any]:
    """What `model.weights` holds, as variables; converted once, then read from the cache.

    The cache is `$GHM_JAX_CACHE`, or ~/.cache/ghm_jax: an Orbax checkpoint for each content of a
    file (by its sha256) and architecture.

    Args:
        model: with `weights`.
        like: `params` and `batch_stats` of the network (arrays or ShapeDtypeStructs).

    Returns:
        `params` and `batch_stats`, each with a `backbone` of f32 arrays.

    Raises:
        ConfigError: the weights cannot be read or do not fit. Nothing is cached then.
    """
    path = locate(model.weights)
    like = {kind: {"backbone": tree["backbone"]} for kind, tree in like.items()}
    architecture = f"{model.backbone}-{model.width}-{model.stem_kernel}"
    cache = cache_directory("weights")
    entry = cache and cache / f"{architecture}-{_sha256(path)}"
    if entry and entry.is_dir():
        try:
            return restore_tree(entry, like)
        except Exception as error:  # Orbax raises whatever its storage does
            raise ConfigError(
                str(entry), "cached weights that cannot be read", "delete this directory"
            ) from error
    variables = read_backbone(model, path, like)
    if entry:
        _keep(entry, variables)
    return variables


def read_backbone(model: Model, path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of weights holds; see `load_backbone`. The cache is neither read nor written."""
    tensors = load_weights(path).tensors
    try:
        return import_backbone(tensors, like)
    except ValueError as error:
        raise ConfigError(str(path), f"{error}", f"model.backbone is {model.backbone}") from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            str(path), why, f"give the path of weights, or {HUB}OWNER/NAME"
        ) from error


def _keep(entry: Path, variables: dict[str, Any]) -> None:
    """Puts converted weights into the cache, atomically, even if another process does the same."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".making-"))
    except OSError:
        return  # the cache only saves time
    try:
        save_tree(scratch / entry.name, variables)
        (scratch / entry.name).rename(entry)
    except OSError:
        pass  # no space, or another process was faster
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

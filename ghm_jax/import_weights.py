"""Files of published weights: read without running what is in them, looked up, kept converted.

What their tensors mean is `ghm_jax.models.weight_conversion`'s. A source is the path of a file, or
`hf://OWNER/NAME[/FILE]` for a file on the Hugging Face Hub (`model.safetensors` by default).
"""

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ghm_jax.config import Config, ConfigError, Data, Model
from ghm_jax.data.dataset import data_set_names, open_dataset
from ghm_jax.data.schema import COCO_CATEGORIES
from ghm_jax.models.weight_conversion import class_rows_of, import_backbone, import_detector
from ghm_jax.runs.checkpoint import Checkpoints, restore_tree, save_tree
from ghm_jax.runs.directory import RunDirectory, cache_directory, claim_run
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.step import init_state, make_model

HUB = "hf://"
# Torch keeps a state dict by itself or in a dict beside the optimizer's, under one of these.
_NESTED = ("state_dict", "model")


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .pth or .pt file by name; floating ones as float32.

    A .pth is a pickle: torch (the extra `torch`) reads it without running code that it may hold.

    Raises:
        ConfigError: no such file, one that is cut off, damaged, of another kind or holds code, or
            torch is missing. One line that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the path of weights, or {HUB}OWNER/NAME")
    readers = {".safetensors": _read_safetensors, ".pth": _read_pickle, ".pt": _read_pickle}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: not one of {', '.join(readers)}; which weights are these?")
    tensors = readers[path.suffix](path)
    if not tensors:
        raise ConfigError(f"{path}: holds no tensors")
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error
    return {name: _as_float32(tensor) for name, tensor in tensors.items()}


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ConfigError(
            f'{path}: needs torch to be read: pip install "ghm-jax[torch]", '
            "or save the weights as .safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises whatever its unpickler, zip or tar reader does
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise ConfigError(
                f"{path}: refused, it holds more than tensors and plain values, which may be code; "
                "save its state dict as .safetensors where you trust it"
            ) from error
        raise _unreadable(path, error) from error
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path}: holds no state dict but a {type(state).__name__}")
    return {
        str(name): _as_float32(tensor.detach().float() if tensor.is_floating_point() else tensor)
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def _as_float32(tensor: Any) -> np.ndarray:
    tensor = np.asarray(tensor)
    return tensor if np.issubdtype(tensor.dtype, np.integer) else tensor.astype(np.float32)


def _unreadable(path: Path, error: Exception) -> ConfigError:
    what = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return ConfigError(f"{path}: cannot be read, cut off or damaged ({what}); get the file again")


def locate(source: str) -> Path:
    """The file of a source; one on the Hub is downloaded, unless it is here already.

    Raises:
        ConfigError: it cannot be downloaded, or the extra `hub` is missing.
    """
    if not source.startswith(HUB):
        return Path(source)
    owner, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name):
        raise ConfigError(f"{source}: write {HUB}OWNER/NAME or {HUB}OWNER/NAME/FILE")
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ConfigError(
            f'{source}: needs huggingface_hub: pip install "ghm-jax[hub]", '
            "or download the file and give its path"
        ) from None
    try:
        return Path(
            hf_hub_download(repo_id=f"{owner}/{name}", filename=file or "model.safetensors")
        )
    except (OSError, ValueError) as error:  # no network, no such file, a name that cannot be
        what = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{source}: cannot be downloaded ({what}); download the file and give its path"
        ) from error


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
        ConfigError: the weights cannot be had or do not fit. Nothing is cached then.
    """
    path = locate(model.weights)
    like = {kind: {"backbone": tree["backbone"]} for kind, tree in like.items()}
    architecture = f"{model.backbone}-{model.width}-{model.stem_kernel}"
    entry = cache_directory("weights") / f"{architecture}-{_sha256(path)}"
    if entry.is_dir():
        try:
            return restore_tree(entry, like)
        except Exception as error:  # Orbax raises whatever its storage does
            raise ConfigError(
                f"{entry}: cached weights that cannot be read; delete this directory"
            ) from error
    tensors = load_tensors(path)
    try:
        variables = import_backbone(tensors, like)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; model.backbone is {model.backbone}") from error
    _keep(entry, variables)
    return variables


def import_run(source: str, config: Config, run_dir: str | Path) -> RunDirectory:
    """Makes a run of a published detector: `config` and the weights as the state before step 1.

    It is a run like any other: it can be evaluated, exported, and trained further.

    Args:
        source: weights of a whole detector.
        config: of the same network; its data set gives the classes, and must be prepared unless it
            is COCO, whose classes are known.
        run_dir: where the run goes.

    Raises:
        ConfigError: the weights cannot be had or do not fit, or the place is taken. Nothing is
            left behind then.
    """
    config.check()
    config = replace(config, data=_resolved(config.data))
    if RunDirectory(Path(run_dir)).has_checkpoint:
        raise ConfigError(f"{run_dir}: holds a checkpoint already; choose another --run-dir")

    path = locate(source)
    tensors = load_tensors(path)
    model, optimizer = make_model(config, len(config.data.classes)), make_optimizer(config)
    blank = jax.eval_shape(functools.partial(init_state, config, model, optimizer))
    try:
        rows = class_rows_of(tensors, config.data.classes, COCO_CATEGORIES)
        like = {"params": blank.params, "batch_stats": blank.batch_stats}
        variables = import_detector(tensors, like, rows)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error

    state = jax.jit(functools.partial(init_state, config, model, optimizer))(variables)
    run = claim_run(run_dir, config)
    with Checkpoints(run.checkpoints, config.run.keep) as checkpoints:
        checkpoints.save(0, state)
        checkpoints.wait()
    return run


def _resolved(data: Data) -> Data:
    """With the data set's name and classes. COCO need not be at hand, for predictions on images of
    one's own."""
    if data.name in ("coco/2014", "coco/2017") and data.name not in data_set_names(Path(data.dir)):
        return replace(data, classes=tuple(COCO_CATEGORIES))
    dataset = open_dataset(data, data.validation_split)
    return replace(data, name=dataset.name, classes=dataset.class_names)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give the path of weights, or {HUB}OWNER/NAME"
        ) from error


def _keep(entry: Path, variables: dict[str, Any]) -> None:
    """Puts converted weights into the cache, whole or not at all, whoever else does the same."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".making-"))
    except OSError:
        return  # a cache that cannot be written saves no time, and that is all
    try:
        save_tree(scratch / entry.name, variables)
        (scratch / entry.name).rename(entry)
    except OSError:
        pass  # no space, or another process was faster
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

"""Reads files of published weights without running code they may contain.

A source is the path of a file, or `hf://OWNER/NAME[/FILE]` for a file on the Hugging Face Hub
(`model.safetensors` by default).
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghm_jax.exceptions import ConfigError
from ghm_jax.models.weight_conversion import is_float

HUB = "hf://"


class Weights(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, np.ndarray]
    """Arrays by name; floats as float32, others as they are."""
    classes: Any = None
    """What the file says of its classes, unread; None if nothing."""


# Prefixes of whatever wraps a model: DataParallel, torch.compile, Lightning.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_WRAPPERS_COUNTER = "n_averaged"  # of torch.optim.swa_utils, which also puts `module.` in front

# A .pth is a state dict, or a checkpoint with the state dict under one of these keys.
_NESTED = ("state_dict", "model")


def load_weights(path: str | Path) -> Weights:
    """What a .safetensors, .pth or .pt file holds; a wrapper's prefix of all names is taken off.

    A .pth is a pickle: torch (the extra `torch`) reads it without running code. The classes are
    the metadata `classes` of a .safetensors, and of mmdetection's .pth those in its `meta`.

    Raises:
        ConfigError: the file is missing, truncated, damaged, quantized, of an unknown type or
            contains code, or torch is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(str(path), "no such file", f"give a file of weights, or {HUB}OWNER/NAME")
    readers = {".safetensors": _read_safetensors, ".pth": _read_pickle, ".pt": _read_pickle}
    if path.suffix not in readers:
        kinds = ", ".join(readers)
        raise ConfigError(str(path), f"not one of {kinds}", "give weights of one of these types")
    weights = readers[path.suffix](path)
    if not weights.tensors:
        raise ConfigError(str(path), "holds no tensors", "give another file")
    return weights._replace(tensors=_unwrapped(weights.tensors))


def _unwrapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without prefixes of wrappers that all names have."""
    while True:
        inner = {name: tensor for name, tensor in tensors.items() if name != _WRAPPERS_COUNTER}
        common = [p for p in _WRAPPERS if inner and all(name.startswith(p) for name in inner)]
        if not common:
            return tensors
        tensors = {name.removeprefix(common[0]): tensor for name, tensor in inner.items()}


def _read_safetensors(path: Path) -> Weights:
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as file:
            names = list(file.keys())
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if re.match(r"F[1-8](_|$)", kind):  # of which NumPy has none
                    raise _quantized(path, f"{name} is {kind}")
            tensors = {name: _as_float32(file.get_tensor(name)) for name in names}
            return Weights(tensors, (file.metadata() or {}).get("classes"))
    except ConfigError:
        raise
    except Exception as error:  # whatever safetensors and NumPy raise
        raise _unreadable(path, error) from error


def _read_pickle(path: Path) -> Weights:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ConfigError(
            str(path),
            "reading it needs torch",
            'pip install "ghm-jax[torch]", or save the weights as .safetensors',
        ) from None
    _check_zip(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's unpickler, zip or tar reader raises
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise ConfigError(
                str(path),
                "refused: it contains more than tensors and plain values, possibly code",
                "if you trust it, save its state dict as .safetensors",
            ) from error
        raise _unreadable(path, error) from error
    classes = _classes_in(state)
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise ConfigError(str(path), f"holds a {kind}, not a state dict", "give another file")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_quantized or (tensor.is_floating_point() and tensor.element_size() < 2):
            raise _quantized(path, f"{name} is {tensor.dtype}")
        try:
            tensor = tensor.detach()
            tensors[str(name)] = np.asarray(
                tensor.float() if tensor.is_floating_point() else tensor
            )
        except Exception as error:  # a sparse tensor, or one without values
            raise _unreadable(path, error) from error
    return Weights(tensors, classes)


def _check_zip(path: Path) -> None:
    """Raises ConfigError if a checksum in a .pth of the zip format is wrong: torch compares none.

    The older format has none, nor have files saved without; their checksums are all 0.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                named = any(entry.CRC for entry in archive.infolist())
                if named and (wrong := archive.testzip()):
                    raise zipfile.BadZipFile(f"{wrong} has another checksum than when it was saved")
    except Exception as error:  # whatever zipfile and zlib raise
        raise _unreadable(path, error) from error


def _classes_in(state: Any) -> Any:
    """The classes that a checkpoint of mmdetection (1.x to 3.x) names; None if there are none."""
    meta = state.get("meta") if isinstance(state, Mapping) else None
    if isinstance(meta, Mapping):
        meta = meta.get("dataset_meta", meta)
    if not isinstance(meta, Mapping):
        return None
    return meta.get("CLASSES", meta.get("classes"))


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32) if is_float(tensor.dtype) else tensor


def _quantized(path: Path, what: str) -> ConfigError:
    return ConfigError(
        str(path), f"{what}: quantized weights are not supported", "give the unquantized weights"
    )


def _unreadable(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, OSError) and error.strerror:
        return ConfigError(str(path), f"cannot be read ({error.strerror})")
    what = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return ConfigError(str(path), f"truncated or damaged ({what})", "get the file again")


def locate(source: str) -> Path:
    """The file of a source; one on the Hub is downloaded unless it is cached.

    Raises:
        ConfigError: it cannot be downloaded, or the extra `hub` is not installed.
    """
    if not source.startswith(HUB):
        return Path(source)
    owner, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name):
        raise ConfigError(source, "incomplete", f"write {HUB}OWNER/NAME or {HUB}OWNER/NAME/FILE")
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ConfigError(
            source,
            "downloading it needs huggingface_hub",
            'pip install "ghm-jax[hub]", or download the file and give its path',
        ) from None
    try:
        return Path(
            hf_hub_download(repo_id=f"{owner}/{name}", filename=file or "model.safetensors")
        )
    except (OSError, ValueError) as error:  # no network, no such file, an invalid name
        what = str(error).strip().partition("\n")[0]
        raise ConfigError(
            source, f"cannot be downloaded ({what})", "download the file and give its path"
        ) from error

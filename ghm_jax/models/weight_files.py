"""Reads files of published weights without running code they may contain.

A source is the path of a file, or `hf://OWNER/NAME[/FILE]` for a file on the Hugging Face Hub
(`model.safetensors` by default).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ghm_jax.exceptions import ConfigError

HUB = "hf://"


# A .pth is a state dict, or a checkpoint with the state dict under one of these keys.
_NESTED = ("state_dict", "model")


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .pth or .pt file by name; floating-point ones as float32.

    A .pth is a pickle: torch (the extra `torch`) reads it without running code.

    Raises:
        ConfigError: the file is missing, truncated, damaged, of an unknown type or contains code,
            or torch is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(str(path), "no such file", f"give a file of weights, or {HUB}OWNER/NAME")
    readers = {".safetensors": _read_safetensors, ".pth": _read_pickle, ".pt": _read_pickle}
    if path.suffix not in readers:
        kinds = ", ".join(readers)
        raise ConfigError(str(path), f"not one of {kinds}", "give weights of one of these types")
    tensors = readers[path.suffix](path)
    if not tensors:
        raise ConfigError(str(path), "holds no tensors", "give another file")
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
            str(path),
            "reading it needs torch",
            'pip install "ghm-jax[torch]", or save the weights as .safetensors',
        ) from None
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
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise ConfigError(str(path), f"holds a {kind}, not a state dict", "give another file")
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
    return ConfigError(str(path), f"cut off or damaged ({what})", "get the file again")


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

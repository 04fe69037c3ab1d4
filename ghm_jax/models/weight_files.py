"""Files of published weights, read without running what is in them.

A source is the path of a file, or `hf://OWNER/NAME[/FILE]` for a file on the Hugging Face Hub
(`model.safetensors` by default).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ghm_jax.exceptions import ConfigError

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

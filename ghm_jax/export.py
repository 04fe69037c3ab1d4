"""A run's detector as one file for other programs."""

import json
from pathlib import Path

import safetensors.numpy

from ghm_jax.config import ConfigError
from ghm_jax.inference import restore_variables
from ghm_jax.models.pretrained import export_detector
from ghm_jax.parallel import choose_devices
from ghm_jax.rundir import load_run


def export(run_dir: str | Path, out: str | Path) -> Path:
    """Writes the newest checkpoint of a run; the suffix of `out` says as what.

    .safetensors: the weights in torchvision's names, with the class names (a JSON list) in the
    metadata `classes`. `ghm-jax import` reads them as well.

    Args:
        run_dir: of a run that has a checkpoint.
        out: the file; an old one is replaced when the new one is whole.

    Raises:
        ConfigError: no run, no checkpoint, an unknown suffix, or a network that torchvision lacks.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: {out} does not end in .safetensors")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: no directory {out.parent}; create it first")
    run, config = load_run(run_dir)
    variables, _ = restore_variables(run, config, choose_devices(1)[0])
    try:
        tensors = export_detector(variables)
    except ValueError as error:
        raise ConfigError(f"{run.path}: cannot be exported: {error}") from error
    scratch = out.with_name(out.name + ".part")
    safetensors.numpy.save_file(tensors, scratch, {"classes": json.dumps(config.data.classes)})
    scratch.replace(out)
    return out

"""Experiment files: Python that defines the config of a run, or one for each row of a table."""

import runpy
from pathlib import Path

from ghm_jax.config import Config
from ghm_jax.exceptions import ConfigError


def load_experiment(path: str | Path) -> Config:
    """The config of an experiment: FILE's `config`, or for FILE:ROW one of its `configs`.

    Raises:
        ConfigError: no such file or row, or the file defines no `Config` there.
    """
    file, row = _split_experiment(path)
    if not Path(file).is_file():
        raise ConfigError(file, "no such experiment file", "see experiments/ for a list")
    try:
        defined = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(file, what, "fix the file") from error
    config, configs = defined.get("config"), defined.get("configs")
    if isinstance(configs, dict):
        choice = f"choose from {', '.join(f'{file}:{name}' for name in configs)}"
        if row:
            config = configs.get(row)
            if row not in configs:
                raise ConfigError(str(path), f"no row {row!r}", choice)
        elif config is None:
            raise ConfigError(file, "holds several configs", choice)
    elif row:
        raise ConfigError(str(path), "there are no 'configs' to choose from", f"give {file}")
    if not isinstance(config, Config):
        raise ConfigError(
            str(path), "defines no 'config = Config(...)'", "see experiments/quickstart.py"
        )
    return config


def experiment_name(path: str | Path) -> str:
    """The name of an experiment's runs: `table1-bins_30` for a/table1.py:bins_30."""
    file, row = _split_experiment(path)
    return "-".join(filter(None, [Path(file).stem, row]))


def _split_experiment(path: str | Path) -> tuple[str, str]:
    """FILE and ROW, which may be empty."""
    file, separator, row = str(path).rpartition(".py:")
    return (f"{file}.py", row) if separator else (str(path), "")

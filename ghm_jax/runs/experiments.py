"""Experiment files: Python that defines the config of a run, or one for each row of a table."""

import contextlib
import os
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ghm_jax.config import Config, from_dict, to_dict
from ghm_jax.exceptions import ConfigError


def load_experiment(path: str | Path) -> Config:
    """The config of an experiment: FILE's `config`, or for FILE:ROW one of its `configs`.

    The file may import others of its folder, as a script may.

    Raises:
        ConfigError: no such file or row, or the file defines no `Config` there.
    """
    file, row = _split_experiment(path)
    if not os.path.isfile(file):  # which a name that no file can have is not, either
        raise ConfigError(file, "no such experiment file", "see experiments/ for a list")
    try:
        with _neighbours(Path(file).resolve().parent):
            defined = runpy.run_path(file)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a file raises, SystemExit and its own kinds too
        raise ConfigError(file, _first_line(error), "fix the file") from error
    try:
        config = to_dict(_chosen(defined, file, row))
    except ConfigError:
        raise
    except Exception as error:  # an object that cannot be copied, or that only looks like a dict
        raise ConfigError(str(path), _first_line(error), "fix the file") from error
    try:
        return from_dict(config)  # lists become tuples; Python itself checks no types
    except Exception as error:
        what = str(error) if isinstance(error, ConfigError) else _first_line(error)
        raise ConfigError(str(path), what, "fix the file") from error


def _chosen(defined: Mapping[str, Any], file: str, row: str) -> Config:
    """The config that a file defines, or that of a row if one is given."""
    config, configs = defined.get("config"), defined.get("configs")
    name = f"{file}:{row}" if row else file
    if isinstance(configs, dict):
        if row:
            config = configs.get(row)
            if row not in configs:
                raise ConfigError(name, f"no row {row!r}", _choices(file, configs))
        elif config is None:
            raise ConfigError(file, "holds several configs", _choices(file, configs))
    elif row:
        raise ConfigError(name, "there are no 'configs' to choose from", f"give {file}")
    if not isinstance(config, Config):
        raise ConfigError(
            name, "defines no 'config = Config(...)'", "see experiments/quickstart.py"
        )
    return config


def _choices(file: str, configs: Iterable[Any]) -> str:
    names = [name for name in configs if isinstance(name, str) and name.isprintable()]
    shown = [f"{file}:{name}"[:300] for name in names[:20]] + ["..."] * (len(names) > 20)
    return f"choose from {', '.join(shown)}" if shown else "give some a name, in 'configs'"


def _first_line(error: BaseException) -> str:
    try:
        said = next(filter(None, str(error).splitlines()), "")
    except (Exception, SystemExit):  # its own __str__ fails
        said = ""
    return ": ".join(filter(None, [type(error).__name__, said[:300]]))


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """A folder's modules can be imported, for a while: another may have some of the same name."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed it
            sys.path.remove(str(folder))
        tops = {name.partition(".")[0] for name in set(sys.modules) - before} - before
        ours = {top for top in tops if top in sys.modules and _lies_in(folder, sys.modules[top])}
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ours:
                del sys.modules[name]


def _lies_in(folder: Path, module: Any) -> bool:
    """Whether a top-level module is a file or a package directly in a folder."""
    paths = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    places = [Path(path) for path in paths if path]
    return any(folder in (place.parent, place.parent.parent) for place in places)


def experiment_name(path: str | Path) -> str:
    """The name of an experiment's runs: `table1-bins_30` for a/table1.py:bins_30."""
    file, row = _split_experiment(path)
    return "-".join(filter(None, [Path(file).stem, row]))


def _split_experiment(path: str | Path) -> tuple[str, str]:
    """FILE and ROW, which may be empty."""
    file, separator, row = str(path).rpartition(".py:")
    return (f"{file}.py", row) if separator else (str(path), "")

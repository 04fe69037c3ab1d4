"""From argv to a dataclass, by tyro; what cannot work becomes one line."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import tyro

from ghm_jax.config import Config, flatten, unknown_key
from ghm_jax.exceptions import ConfigError

# Settings by their dotted names; a switch is given like any other: --model.remat True.
AllSettings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


def positional(args: list[str], usage: str) -> str | None:
    """The first argument, which must come first; None when only help is wanted."""
    if args and not args[0].startswith("-"):
        return args[0]
    if "-h" in args or "--help" in args:
        return None
    raise ConfigError(f"usage: {usage} [options]; --help lists them")


def parse(kind: type[Any], args: list[str], program: str, default: Any = None) -> Any:
    """The arguments as a `kind`, by tyro; its errors as one line."""
    settings = flatten(Config())
    for arg in args:
        key = arg.partition("=")[0][2:].replace("-", "_")
        own = set(_own_options(kind))
        lacks_section = key not in own and any(k.endswith(f".{key}") for k in settings)
        if (
            arg.startswith("--")
            and key not in settings
            and (("." in key and key not in own) or lacks_section)
        ):
            raise ConfigError(unknown_key(key))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=args, prog=program, default=default)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise ConfigError(_first_sentence(said.getvalue())) from None


def _own_options(kind: type[Any]) -> Iterator[str]:
    """Options of a command that are no settings, with their section where they have one."""
    for option in dataclasses.fields(kind):
        yield option.name
        section = option.default_factory
        if dataclasses.is_dataclass(section) and section is not Config:
            yield from (f"{option.name}.{inner.name}" for inner in dataclasses.fields(section))


def _first_sentence(boxed: str) -> str:
    """What a tyro error box says before its first rule, on one line."""
    lines = []
    for line in boxed.splitlines():
        text = line.strip(" │")
        if text.startswith(("╭", "╰")):
            continue
        if text.startswith("─"):
            break
        lines.append(text)
    return f"{' '.join(lines) or boxed.strip()} (--help lists all settings)"


def fail(message: str | None) -> NoReturn:
    """Ends the program with one line on stderr; None: another process of the job says it."""
    if message is not None:
        print(f"ghm-jax: {message}", file=sys.stderr)
    sys.exit(1)

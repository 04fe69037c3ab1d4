"""How the command line spells what the library says: parameters and settings as options."""

import re
import sys
from typing import NoReturn

from ghm_jax import progress
from ghm_jax.exceptions import ArgumentError, UserError

_NAME = re.compile(r"`([a-z_]\w*(?:\.[a-z_]\w*)*)`")


def option(name: str) -> str:
    """The option that gives a parameter or a setting: --data.on-error for data.on_error."""
    return "--" + name.replace("_", "-")


def as_options(text: str) -> str:
    """A text of the library with the names in backticks as options."""
    return _NAME.sub(lambda match: option(match[1]), text)


def one_line(error: UserError) -> str:
    """An error as `key: problem; remedy`; the key of an `ArgumentError` is an option too."""
    key = option(error.key) if isinstance(error, ArgumentError) else error.key
    return str(UserError(key, as_options(error.problem), as_options(error.remedy)))


def fail(message: str | None) -> NoReturn:
    """Exits with 1 after one line on stderr; None: another process of the job prints it."""
    if message is not None:
        print(f"ghm-jax: {message}", file=sys.stderr)
    sys.exit(1)


class Bar(progress.Bar):
    """A progress bar whose lines are spelled for the command line."""

    def say(self, line: str) -> None:
        super().say(as_options(line))

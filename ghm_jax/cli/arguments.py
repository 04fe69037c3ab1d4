"""From argv to a dataclass, by tyro; arguments that cannot be used give a one-line error."""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from ghm_jax.config import Config, flatten, unknown_key
from ghm_jax.exceptions import ArgumentError, ConfigError

# Settings by their dotted names. A switch takes a value like all others, --model.remat True; alone
# it means True (see `_switch`).
AllSettings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


@dataclass
class DataPlace:
    """The data of a run that was moved, or whose data was."""

    dir: str = ""
    """Directory that holds the prepared data sets now (where it was when the run was trained)."""


_OPTION = re.compile("--?[a-zA-Z]")


class Option(NamedTuple):
    """One option as it was typed."""

    name: str
    """`data.on_error` for --data.on-error."""
    words: tuple[str, ...]
    """The option itself and its values."""


@dataclass(frozen=True)
class Arguments:
    """The words after the name of a command, split once."""

    positionals: tuple[str, ...]
    """Those before the first option."""
    options: tuple[Option, ...]
    help_wanted: bool

    @classmethod
    def split(cls, words: Sequence[str]) -> "Arguments":
        """Splits at words that look like options; numbers such as -1 are values.

        `~` at the start of a value is the home directory: not every shell replaces it after `=`.
        """
        positionals: list[str] = []
        options: list[Option] = []
        for word in map(os.path.expanduser, words):
            if _OPTION.match(word):
                name, equals, value = word.partition("=")
                typed = name + equals + os.path.expanduser(value)
                options.append(Option(name.lstrip("-").replace("-", "_"), (typed,)))
            elif options:
                options[-1] = options[-1]._replace(words=(*options[-1].words, word))
            else:
                positionals.append(word)
        help_wanted = any(option.words[0] in ("-h", "--help") for option in options)
        return cls(tuple(positionals), tuple(options), help_wanted)

    @property
    def words(self) -> list[str]:
        """All of them, as they were typed (but for `~`)."""
        return [*self.positionals, *(word for option in self.options for word in option.words)]

    def section(self, name: str) -> "Arguments":
        """The options NAME.something alone."""
        inside = tuple(o for o in self.options if o.name.startswith(f"{name}."))
        return Arguments((), inside, help_wanted=False)

    def required(self, count: int, usage: str) -> tuple[str, ...]:
        """The first `count` positionals; empty ones if only help is wanted.

        Raises:
            ConfigError: there are fewer before the first option.
        """
        if len(self.positionals) >= count:
            return self.positionals[:count]
        if not self.help_wanted:
            raise ConfigError("usage", f"{usage} [options]", "--help lists them")
        return (*self.positionals, *[""] * (count - len(self.positionals)))


def parse(kind: type[Any], arguments: Arguments, program: str, default: Any = None) -> Any:
    """The arguments as a `kind`, by tyro.

    Raises:
        ConfigError: an unknown setting, or what tyro rejects.
    """
    settings = flatten(Config())
    known = {*settings, *_own_options(kind)}
    words = list(arguments.positionals)
    for given in arguments.options:
        name, with_value = _switch(given, settings)
        like_a_setting = "." in name or any(key.endswith(f".{name}") for key in settings)
        if name not in known and like_a_setting:
            raise unknown_key(name)
        words += with_value
    # tyro tells what it rejects by printing a box and exiting; the hook of newer versions, which
    # would get the text itself, is private.
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=words, prog=program, default=default)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise ConfigError("", _first_sentence(box.getvalue()), "") from None


def _switch(given: Option, settings: Mapping[str, Any]) -> Option:
    """--model.remat as --model.remat True, --model.no-remat as --model.remat False."""
    word, *values = given.words
    if values or "=" in word:
        return given
    section, dot, leaf = given.name.rpartition(".")
    positive = section + dot + leaf.removeprefix("no_")
    if not isinstance(settings.get(positive), bool):
        return given
    return Option(positive, (f"--{positive}", str(positive == given.name)))


def check_positive(**values: int | Sequence[int] | None) -> None:
    """Raises ArgumentError for the first of the options that is given and not above zero, or that
    does not fit in 32 bits."""
    for name, value in values.items():
        numbers = [value] if isinstance(value, int) else value
        if numbers and min(numbers) < 1:
            raise ArgumentError(name, f"must be positive, got {value}")
        if numbers and max(numbers) >= 2**31:
            raise ArgumentError(name, f"must be below 2**31, got {value}")


def _own_options(kind: type[Any]) -> Iterator[str]:
    """Options of a command that are not settings, with their section if they have one."""
    for option in dataclasses.fields(kind):
        yield option.name
        section = option.default_factory
        if dataclasses.is_dataclass(section) and section is not Config:
            yield from (f"{option.name}.{inner.name}" for inner in dataclasses.fields(section))


def _first_sentence(boxed: str) -> str:
    """What a tyro error box says before its first rule, on one line.

    Where the output cannot hold the characters of a box, its title stands above a rule of hyphens.
    "Got errors:" begins what each type of a number or a word rejected, with tyro's internals.
    """
    texts = [line.strip(" │") for line in boxed.splitlines()]
    if "╭" not in boxed and (rules := [i for i, text in enumerate(texts) if text[:3] == "---"]):
        texts = texts[rules[0] + 1 :]
    lines = []
    for text in texts:
        if text.startswith(("─", "---")) or text == "Got errors:":
            break
        if text and not text.startswith(("╭", "╰")):
            lines.append(text)
    said = " ".join(lines) or boxed.strip()
    said = said if len(said) <= 500 else f"{said[:200]} ... {said[-200:]}"
    return f"{said} (--help lists all settings)"


def check_out(out: str) -> None:
    """Raises ArgumentError if the file cannot be written, before anything is measured."""
    from ghm_jax.storage import why_not_writable

    if out and not Path(out).absolute().parent.is_dir():
        raise ArgumentError("out", f"no directory {Path(out).parent}", "create it first")
    if out and (why := why_not_writable(Path(out))):
        raise ArgumentError("out", f"{out} cannot be written ({why})", "choose another file")

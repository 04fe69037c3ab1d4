"""Bounds declared in the type of the setting they bound, as in `bins: Positive[int] = 30`."""

import functools
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from ghm_jax.json_text import shown

Number = TypeVar("Number", int, float)


class Bound(NamedTuple):
    """A condition on the value of a setting, part of its type: `Annotated[int, Bound(...)]`."""

    holds: Callable[[Any], bool]
    words: str
    """The problem with a value that violates it, such as "must be positive"."""


Positive = Annotated[Number, Bound(lambda value: value > 0, "must be positive")]
NotNegative = Annotated[Number, Bound(lambda value: value >= 0, "must not be negative")]
Fraction = Annotated[Number, Bound(lambda value: 0 <= value <= 1, "must be in [0, 1]")]
BelowOne = Annotated[Number, Bound(lambda value: 0 <= value < 1, "must be in [0, 1)")]


_LARGEST = (2 - 2**-23) * 2.0**127  # of float32


def problems(settings: Any) -> Iterator[tuple[str, str]]:
    """(name, problem) of the fields of a dataclass that are out of bounds.

    A field is bounded by each `Bound` of its type and by the choices of a `Literal`; a float must
    also be finite in 32 bits, which the devices compute with. Nested dataclasses are not checked.
    """
    for name, kind in _kinds(type(settings)).items():
        value = getattr(settings, name)
        kind = kind_of(kind, value)
        if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
            yield name, f"{shown(value)} is not one of {', '.join(map(str, typing.get_args(kind)))}"
        if isinstance(value, float) and not abs(value) <= _LARGEST:
            yield name, f"must be a finite number of 32 bits, got {value}"
        for bound in getattr(kind, "__metadata__", ()):
            if isinstance(bound, Bound) and not bound.holds(value):
                yield name, f"{bound.words}, got {shown(value)}"


def kind_of(kind: Any, value: Any) -> Any:
    """The type that counts for a value, where a setting is a number or a word: of
    `Positive[float] | Literal["all"]` the one or the other. All other types as they are."""
    if typing.get_origin(kind) is not typing.Union:
        return kind
    number, words = typing.get_args(kind)
    return words if isinstance(value, str) else number


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)

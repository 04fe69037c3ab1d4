"""What a check reports; a check that fails is a finding as well."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ghm_jax.exceptions import UserError


@dataclass(frozen=True)
class Finding:
    """One line of the report. Settings in `says` and `remedy` stand in backticks, as in the
    messages of `ghm_jax.exceptions`."""

    what: str
    """What was checked."""
    good: bool
    says: str
    """What was found."""
    remedy: str = ""
    """How to fix it; not empty if it is not good."""


def guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an error that ends it is one of them."""
    try:
        yield from check()
    except UserError as error:
        yield fault_of(what, error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield Finding(what, False, f"cannot be checked ({said})", "fix what the error names")


def fault_of(what: str, error: UserError) -> Finding:
    """The finding that an error is."""
    says = ": ".join(filter(None, (error.key, error.problem)))
    return Finding(what, False, says, error.remedy or "fix what this line names")

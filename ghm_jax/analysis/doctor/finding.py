"""What a check says, and that no check fails itself."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ghm_jax.exceptions import ConfigError


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    """Was looked at."""
    good: bool
    says: str
    """What was found."""
    remedy: str = ""
    """What to do; given when it is not good."""


def guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that breaks off is a finding."""
    try:
        yield from check()
    except ConfigError as error:
        problem, _, remedy = str(error).rpartition("; ")
        yield Finding(what, False, problem or remedy, remedy if problem else "see the line itself")
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield Finding(what, False, f"cannot be checked ({said})", "mend what the error names")

"""JSON of people and of disks: whatever it holds, it is read or is one line."""

import json
import reprlib
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; bytes are UTF-8 with or without a byte order mark, UTF-16 or 32.

    Raises:
        ValueError: it is not JSON, nested too deeply, or has an integer of thousands of digits. The
            message is one short line.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON ({error})"[:200]) from None
    except ValueError:  # Python's limit; its own message advises to lift it
        raise ValueError("is not JSON (an integer has thousands of digits)") from None


def shown(value: Any) -> str:
    """A value for a message: one short line, whatever it is."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an integer of more than 4300 digits, or an object's own __repr__
        return f"a value of the type {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


_SHORT = reprlib.Repr()
_SHORT.maxlong = _SHORT.maxother = 60
_SHORT.maxstring = 80

"""Writes docs/config.md, every setting with its default, from the source of `ghm_jax.config`.

`make docs` runs it before it builds the site; the page is not in git, so it is always current.
"""

import ast
import dataclasses
import inspect
import itertools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghm_jax import config

HEAD = """# Every setting

An experiment file defines `config = Config(...)`; any setting below can be overridden on the
command line by its name, such as `--loss.ghm-c.momentum 0.9`. `config.check()` rejects settings
that cannot work, before any compute.
The defaults are the published RetinaNet-R50 recipe on COCO with this package's GHM settings.
"""


def page() -> str:
    """The page as Markdown."""
    default = config.Config()
    return (
        "\n".join([HEAD, "## A whole run\n", *_table(default, ""), *_sections(default, "")]) + "\n"
    )


def _sections(values: Any, prefix: str) -> Iterator[str]:
    """A heading and a table for each dataclass that is a field of another one."""
    for field in dataclasses.fields(values):
        section, name = getattr(values, field.name), prefix + field.name
        if dataclasses.is_dataclass(section):
            meaning, _, _ = str(inspect.getdoc(section)).partition("\n\n")
            yield from (f"\n## {name}\n", f"{meaning}\n")
            yield from _table(section, f"{name}.")
            yield from _sections(section, f"{name}.")


def _table(values: Any, prefix: str) -> Iterator[str]:
    """Rows of a class: a field, and the string below it that tells what it is."""
    yield from ("| setting | type | default | |", "| --- | --- | --- | --- |")
    kinds = typing.get_type_hints(type(values))
    (node,) = ast.parse(inspect.getsource(type(values))).body
    for field, text in itertools.pairwise(node.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(meaning))),
            ) if not dataclasses.is_dataclass(kinds[name]):
                cells = [_type(kinds[name]), repr(getattr(values, name)), " ".join(meaning.split())]
                kind, default, meaning = (cell.replace("|", "\\|") for cell in cells)
                yield f"| `{prefix}{name}` | `{kind}` | `{default}` | {meaning} |"


def _type(kind: Any) -> str:
    """As the source spells it, without bounds; of a Literal the choices alone."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(repr, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs/config.md").write_text(page())

"""Writes docs/config.md, every setting with its default, from the source of `ghm_jax.config`.

`make docs` runs it before it builds the site; the page is not kept in git, so it cannot be stale.
"""

import ast
import dataclasses
import inspect
from pathlib import Path

from ghm_jax import config

HEAD = """# Every setting

An experiment file defines `config = Config(...)`; any setting below can be overridden on the
command line by its name, such as `--loss.momentum 0.9`. `config.check()` refuses what cannot work,
before any device is touched.
The defaults are the published RetinaNet-R50 recipe on COCO with this package's GHM settings.
"""


def page() -> str:
    """The page as Markdown."""
    tree = ast.parse(inspect.getsource(config))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    default = config.Config()
    parts = [HEAD, "## A whole run\n", *_table(classes["Config"], default, "")]
    for field in dataclasses.fields(default):
        section = getattr(default, field.name)
        if dataclasses.is_dataclass(section):
            node = classes[type(section).__name__]
            parts += [f"\n## {field.name}\n", f"{ast.get_docstring(node)}\n"]
            parts += _table(node, section, f"{field.name}.")
    return "\n".join(parts) + "\n"


def _table(node: ast.ClassDef, values: object, prefix: str) -> list[str]:
    """Rows of a class: a field, and the string below it that tells what it is."""
    rows = ["| setting | type | default | |", "| --- | --- | --- | --- |"]
    for field, text in zip(node.body, node.body[1:], strict=False):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name), annotation=kind),
                ast.Expr(value=ast.Constant(value=str(meaning))),
            ):
                choices = ast.unparse(kind).removeprefix("Literal").replace("|", "\\|")
                choices = choices.strip("[]") if isinstance(kind, ast.Subscript) else choices
                if ast.unparse(kind).startswith("tuple"):
                    choices = ast.unparse(kind)
                default = repr(getattr(values, name)).replace("|", "\\|")
                meaning = " ".join(meaning.split()).replace("|", "\\|")
                rows.append(f"| `{prefix}{name}` | `{choices}` | `{default}` | {meaning} |")
    return rows


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs/config.md").write_text(page())

"""Converts the formulas of the built site to MathML, which needs no script and no network.

`make docs` runs it on the built site, in which arithmatex has marked every formula.
"""

import html
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def with_mathml(page: str) -> str:
    """A page of HTML with its LaTeX formulas as MathML."""

    def replace(found: re.Match[str]) -> str:
        kind, latex = found.groups()
        display = "block" if kind == "div" else "inline"
        formula = convert(html.unescape(latex).strip(), display=display)
        return f'<{kind} class="arithmatex">{formula}</{kind}>'

    return _FORMULA.sub(replace, page)


if __name__ == "__main__":
    for path in Path(sys.argv[1]).rglob("*.html"):
        path.write_text(with_mathml(path.read_text()))

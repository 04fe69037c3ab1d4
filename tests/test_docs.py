"""The documentation: examples run, links work, tables and settings are current."""

import doctest
import importlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ghm_jax.config import Config, flatten

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(set(DOCS.glob("*.md")) - {DOCS / "config.md"})  # that one is generated
READ = [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"]
TABLES = runpy.run_path(str(ROOT / ".ci/tables.py"))
# Modules whose docstrings hold examples.
WITH_EXAMPLES = ("losses.harmonize", "losses.ghm", "detection.boxes")


def settings_page() -> str:
    return runpy.run_path(str(ROOT / ".ci/config_page.py"))["page"]()


def with_mathml(html: str) -> str:
    pytest.importorskip("latex2mathml", reason="it is in the extra dev")
    return runpy.run_path(str(ROOT / ".ci/formulas.py"))["with_mathml"](html)


def page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """What a link may name behind `#`: the headings, as sites and code hosts spell them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READ, ids=page)
def test_links_between_pages_work(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.is_file(), f"{page(path)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page(path)}: {link}"


@pytest.mark.parametrize("path", READ, ids=page)
def test_files_and_notebooks_that_a_page_names_exist(path):
    for name in re.findall(r"`((?:ghm_jax|experiments|tests|docs)/[\w/.]+)`", path.read_text()):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(0\d_\w+)`", path.read_text()):
        assert (ROOT / f"notebooks/{name}.ipynb").is_file(), name


def test_the_module_map_has_every_part_of_the_package():
    text = (DOCS / "design.md").read_text()
    table = text[text.index("## Module map") : text.index("## Decisions")]
    inside = [p for p in (ROOT / "ghm_jax").iterdir() if not p.name.startswith("_")]
    names = {f"`{p.name}/`" if p.is_dir() else f"`{p.name}`" for p in inside} - {"`py.typed`"}
    assert not [name for name in names if name not in table]


@pytest.mark.parametrize("path", [p for p in PAGES if ">>>" in p.read_text()], ids=page)
def test_examples_of_a_page_run(path):
    failed, tried = doctest.testfile(str(path), module_relative=False)
    assert tried
    assert not failed


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings_run(name):
    failed, tried = doctest.testmod(importlib.import_module(f"ghm_jax.{name}"))
    assert tried
    assert not failed


def test_all_docstrings_with_examples_are_tested():
    package = ROOT / "ghm_jax"
    files = {p for p in package.rglob("*.py") if ">>>" in p.read_text()}
    assert files == {package / f"{name.replace('.', '/')}.py" for name in WITH_EXAMPLES}


def test_the_page_of_settings_has_every_setting_with_its_default_and_description():
    rows = dict(re.findall(r"^\| `([\w.]+)` \|(.*) \|$", settings_page(), re.MULTILINE))
    for key, default in flatten(Config()).items():
        assert key in rows, f"{key}: no description below the field"
        assert f"`{default!r}`" in rows[key]
        assert len(rows[key].split(" | ")[-1]) > 5
    assert len(rows) == len(flatten(Config()))


def test_commands_in_the_pages_exist():
    from ghm_jax.cli import main

    for path in READ:
        for command in set(re.findall(r"^ghm-jax ([a-z]+)", path.read_text(), re.MULTILINE)):
            assert f"ghm-jax {command} " in sys.modules[main.__module__].__doc__, command


def test_the_menu_has_every_page():
    menu = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    named = [file for entry in menu for file in entry.values()]
    assert sorted(named) == sorted([*(path.name for path in PAGES), "config.md"])


@pytest.mark.parametrize("path", TABLES["PAGES"], ids=page)
def test_the_tables_of_results_are_current(path):
    assert TABLES["updated"](path.read_text()) == path.read_text(), "run: make tables"


def test_every_table_of_results_is_shown():
    text = "".join(path.read_text() for path in TABLES["PAGES"])
    assert set(TABLES["TABLES"]) == set(re.findall(r"<!-- table: (\w+) -->\n", text))


def test_a_table_replaces_what_stood_in_its_place():
    padding = TABLES["TABLES"]["padding"]()
    before = "text\n\n<!-- table: padding -->\nold\n<!-- end -->\n\n<!-- other -->\n"
    after = f"text\n\n<!-- table: padding -->\n\n{padding}\n<!-- end -->\n\n<!-- other -->\n"
    assert TABLES["updated"](before) == after
    assert TABLES["updated"](after) == after
    # The result's own numbers: 50.5 % and 16.9 % of padding.
    assert "| one square | 1344 x 1344 | 50.5 % | 1 |" in padding
    with pytest.raises(KeyError, match="unknown"):
        TABLES["updated"]("<!-- table: unknown -->\n<!-- end -->")


def test_formulas_become_mathml_and_the_rest_stays():
    inline, block = r"\(p &lt; \sigma(x)\)", r"\[\frac{1}{N}\]"
    page = f'<p><span class="arithmatex">{inline}</span> and <code>\\(x\\)</code></p>'
    page += f'<div class="arithmatex">{block}</div>'
    made = with_mathml(page)
    assert re.sub("<math.*?</math>", "F", made) == (
        r'<p><span class="arithmatex">F</span> and <code>\(x\)</code></p>'
        '<div class="arithmatex">F</div>'
    )
    first, second = re.findall("<math.*?</math>", made)
    assert "<mi>&#x003C3;</mi>" in first  # sigma
    assert "<mo>&#x0003C;</mo>" in first  # less than
    assert 'display="block"' in second
    assert "<mfrac>" in second


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("zensical", reason="the site's builder is in the extra dev")
    pytest.importorskip("mkdocstrings_handlers.python", reason="it is in the extra dev")
    settings = (ROOT / "zensical.toml").read_text()
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "docs/config.md").write_text(settings_page())
    settings = settings.replace('paths = ["."]', f'paths = ["{ROOT.as_posix()}"]')
    (tmp_path / "zensical.toml").write_text(settings)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site/api/index.html").read_text()
    assert "floor in examples of the whole batch" in api  # a docstring came through

    for path in (tmp_path / "site").rglob("*.html"):
        html = path.read_text()
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?(\w+:[^\s\">]*)", html)
        assert not [url for url in loaded if not url.startswith("data:")], path
        assert html.count('class="arithmatex"') == with_mathml(html).count("<math "), path

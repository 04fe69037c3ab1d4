"""The documentation: examples run, links lead somewhere, the settings are those of the source."""

import doctest
import importlib
import json
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
# Modules whose docstrings hold examples.
WITH_EXAMPLES = ("losses.harmonize", "losses.ghm", "boxes")


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
def test_links_between_pages_lead_somewhere(path):
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


def test_the_design_page_says_what_every_module_is_for():
    text = (DOCS / "design.md").read_text()
    table = text[text.index("## What is where") :]
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


def test_no_docstring_holds_an_example_that_nobody_runs():
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


def test_commands_in_the_pages_are_commands():
    from ghm_jax.cli import main

    for path in READ:
        for command in set(re.findall(r"^ghm-jax ([a-z]+)", path.read_text(), re.MULTILINE)):
            assert f"ghm-jax {command} " in sys.modules[main.__module__].__doc__, command


def test_the_menu_has_every_page():
    menu = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    named = [file for entry in menu for file in entry.values()]
    assert sorted(named) == sorted([*(path.name for path in PAGES), "config.md"])


def test_the_table_of_softmax_losses_is_what_the_notebook_found():
    notebook = json.loads((ROOT / "notebooks/03_your_own_data_and_loop.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    tables = [
        "".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", ())
    ]
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+ to [\d.]+) \|$", tables[-1], re.MULTILINE)
    assert len(rows) == 8
    typed = (DOCS / "losses.md").read_text()
    section = typed[typed.index("## Softmax") : typed.index("## A loss of your own")]
    columns = zip(*re.findall(r"^\| .* \| (.*) \| (.*) \|$", section, re.MULTILINE), strict=True)
    (_, _, *first), (_, _, *second) = columns
    assert [*first, *second] == [f"{mean} ({spread})" for mean, spread in rows]


def test_the_table_of_gradients_is_the_measured_result():
    rows = json.loads((ROOT / "experiments/results/quickstart_stats.json").read_text())["rows"]
    text = (DOCS / "reading.md").read_text()
    typed = re.findall(r"^\| (?:examples|gradient): .*$", text, re.MULTILINE)
    measured = [row for row in rows if row["part"] == "classification"]
    for line, row in zip(typed, measured, strict=True):
        wanted = [f"{100 * row[key]:.2f} %" for key in ("easy", "middle", "hard", "outlier")]
        assert line.split(" | ")[1:] == [*wanted[:-1], f"{wanted[-1]} |"]


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


def test_the_faults_survived_are_the_measured_result():
    rows = json.loads((ROOT / "experiments/results/fault_injection.json").read_text())["rows"]
    page = (ROOT / "docs/recipes.md").read_text()
    for row in rows:
        cells = f"| {row['fault']} | {row['tried']} | {row['survived']} | {row['data_lost']} |"
        assert cells in page


def test_the_table_of_calibration_is_the_measured_result():
    rows = json.loads((ROOT / "experiments/results/calibration.json").read_text())["runs"]
    text = (DOCS / "faq.md").read_text()
    for row in rows:
        figures = [f"{row[key]:.3f}" for key in ("AP", "ECE", "ECE_03")]
        assert " | ".join([*figures, f"{row['detections']:,}"]) in text
        (bin_,) = [part for part in row["bins"] if 0.6 < part["score_to"] <= 0.7]
        if row["loss"] == "focal":
            assert f"at {bin_['score']:.2f}, {100 * bin_['precision']:.0f} % are" in text
    rows = json.loads((ROOT / "experiments/results/calibration_800_steps.json").read_text())["runs"]
    for row in rows:
        keys = ("AP", "ECE") if row["loss"] == "cross_entropy" else ("ECE", "ECE_03")
        assert all(f"{row[key]:.3f}" in text for key in keys)


def test_the_cost_of_inference_is_the_measured_result():
    path = ROOT / "experiments/results/bench_inference.json"
    record = json.loads(path.read_text())
    ours, theirs = record["rows"][:2], record["rows"][2:]
    assert [row["scores"] for row in record["rows"]] == ["peaked", "flat"] * 2
    shares = [f"{100 * row['share']:.1f} %" for row in ours]
    ratios = [
        f"{b['milliseconds'] / a['milliseconds']:.1f}" for a, b in zip(ours, theirs, strict=True)
    ]
    page = (ROOT / "docs/recipes.md").read_text()
    (line,) = re.findall(r"^What follows the network.*$", page, re.MULTILINE)
    height, width = record["case"]["image_size"]
    for words in (
        f"{shares[0]} of the time of both with {ours[0]['candidates']} scores",
        f"{shares[1]} with all {ours[1]['candidates'] / 1e6:.1f} million",
        f"images of {height}x{width} a call",
        f"took {ratios[0]} and {ratios[1]} times as long",
    ):
        assert words in line

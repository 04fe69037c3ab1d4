"""Notebooks run from top to bottom, agree with their pairs, and hold valid outputs."""

import ast
import importlib
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from ghm_jax.config import Data
from ghm_jax.data import DigitScenes, open_dataset

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    # A copy of the checkout, so that data and runs are not written into the real one.
    (tmp_path / "experiments").mkdir()
    for experiment in (ROOT / "experiments").glob("*.py"):
        shutil.copy(experiment, tmp_path / "experiments")
    for folder in ("study", "results/study"):
        shutil.copytree(ROOT / "experiments" / folder, tmp_path / "experiments" / folder)
    monkeypatch.setattr(DigitScenes, "SCENES", {"train": 16, "validation": 6})
    open_dataset(Data(name="digit_scenes", dir=str(tmp_path / "data")), "train")

    monkeypatch.setenv("GHM_NOTEBOOK_SMOKE", "1")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")  # a notebook uses all cores by itself
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is nearly all of the time
    # If Jupyter's widgets are missing, tqdm warns and draws its bar as text.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no profile of the user
    notebook = nbformat.read(path, as_version=4)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    printed = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    assert not [text for text in printed if "Warning" in text]


@every_notebook
def test_what_a_notebook_imports_of_the_package_exists(path):
    for node in ast.walk(ast.parse(path.with_suffix(".py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ghm_jax"):
            for alias in node.names:
                if not hasattr(importlib.import_module(node.module), alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")  # a module of a package


@every_notebook
def test_a_notebook_is_the_same_as_its_pair(path):
    notebook = nbformat.read(path, as_version=4)
    pair = jupytext.read(path.with_suffix(".py"))
    assert notebook.metadata.jupytext.formats == "ipynb,py:percent"
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in pair.cells
    ], f"run: jupytext --sync {path.relative_to(ROOT)}"


@every_notebook
def test_the_outputs_stored_in_a_notebook_are_valid_and_complete(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 700_000  # a code host shows larger ones slowly or not at all
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        ast.parse(cell.source)
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
    ran = [cell.execution_count for cell in code]
    whole = [*range(1, len(code) + 1)]
    assert ran in (whole, [None] * len(code)), "only some cells were run: run all, from the top"


@every_notebook
def test_all_notebooks_start_with_the_same_installation(path):
    cells = [cell.source for cell in jupytext.read(path.with_suffix(".py")).cells]
    (badge,) = [source for source in cells if "colab-badge.svg" in source]
    assert badge == cells[0]
    assert cells[1] == jupytext.read(NOTEBOOKS[0].with_suffix(".py")).cells[1].source

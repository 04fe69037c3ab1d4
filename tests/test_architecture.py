"""Rules that readers rely on and no linter checks: who imports whom, and what is forbidden."""

import ast
import dataclasses
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

from ghm_jax.config import Config, flatten

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ghm_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a part may import parts of lower floors only. A folder is one part.
FLOORS = (
    ("exceptions", "json_text", "batch", "progress"),
    ("bounds", "bucket"),
    ("harmonizing", "storage"),
    ("config",),
    ("losses", "models", "data", "distributed"),
    ("detection", "runs"),
    ("training", "plots"),
    ("evaluation",),
    ("analysis",),
    ("train", "evaluate", "predict", "export", "import_weights"),
    ("bench",),
    ("cli",),
)
# All imports between parts. A new one is a decision: add it here, or avoid it.
IMPORTS = {
    "exceptions": "",
    "json_text": "",
    "bounds": "json_text",
    "batch": "",
    "bucket": "exceptions",
    "storage": "bucket exceptions",
    "progress": "",
    "harmonizing": "bounds",
    "config": "bounds exceptions harmonizing json_text",
    "losses": "bounds harmonizing",
    "models": "exceptions json_text",
    "data": "batch bucket config exceptions json_text progress storage",
    "distributed": "exceptions",
    "detection": "batch config exceptions losses models",
    "runs": "config distributed exceptions json_text storage",
    "training": "batch config data detection distributed exceptions losses models progress runs "
    "storage",
    "plots": "batch losses runs",
    "evaluation": "batch config data detection distributed exceptions plots progress runs storage "
    "training",
    "analysis": "batch config data detection distributed evaluation exceptions losses models "
    "plots progress runs storage training",
    "train": "analysis config data distributed evaluation exceptions progress runs storage "
    "training",
    "evaluate": "analysis config data distributed evaluation exceptions progress runs storage "
    "training",
    "predict": "config data detection distributed evaluation exceptions plots progress runs "
    "storage",
    "export": "batch config detection distributed evaluation exceptions models progress runs "
    "storage training",
    "import_weights": "config data distributed exceptions models progress runs storage training",
    "bench": "analysis batch config data detection distributed evaluation losses training",
    "cli": "analysis bench config data distributed evaluate evaluation exceptions export "
    "import_weights plots predict progress runs storage train training",
}
LONGEST_FUNCTION = 60  # lines, with its docstring

# The losses are for everybody's training loop, whatever holds its weights.
LOSSES_MAY_IMPORT = {"jax", "numpy", "optax", "ghm_jax"} | sys.stdlib_module_names


def part_of(path: Path) -> str:
    """The part a file belongs to: `losses` for ghm_jax/losses/ghm.py, `boxes` for boxes.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it, relative ones written out."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from ghm_jax import boxes` imports ghm_jax.detection.boxes.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    """Path below the project's root, to show."""
    return path.relative_to(ROOT).as_posix()


each_module = pytest.mark.parametrize("path", MODULES, ids=name)


def edges() -> dict[str, set[str]]:
    """Which parts of ours each part imports."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("ghm_jax.")}
        found.setdefault(part_of(path), set()).update(ours - {part_of(path)})
    del found["__init__"]
    return found


def test_the_imports_between_parts_are_those_listed():
    assert edges() == {part: set(named.split()) for part, named in IMPORTS.items()}


def test_imports_point_down_only():
    floor_of = {part: number for number, floor in enumerate(FLOORS) for part in floor}
    assert floor_of.keys() == IMPORTS.keys()
    for part, named in IMPORTS.items():
        for other in named.split():
            assert floor_of[other] < floor_of[part], f"{part} imports {other}"


def test_modules_do_not_import_each_other_in_a_circle():
    name_of = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
    graph = {}
    for path, name in name_of.items():
        # `from ghm_jax.losses import harmonize` imports a module or a name of one.
        graph[name] = {
            other
            for found in imports(path)
            for other in (found, found.rpartition(".")[0])
            if other in name_of.values() and other != name
        }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@each_module
def test_the_package_does_not_import_experiments_notebooks_or_tests(path):
    outside = {found.split(".")[0] for found in imports(path)}
    assert not outside & {"experiments", "notebooks", "tests"}


@pytest.mark.parametrize("path", [*MODULES, *(ROOT / "experiments").rglob("*.py")], ids=name)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{name(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "losses"], ids=name)
def test_losses_need_only_jax_numpy_and_optax(path):
    assert {found.split(".")[0] for found in imports(path)} <= LOSSES_MAY_IMPORT


@each_module
def test_only_models_define_flax_modules(path):
    if any(found.startswith("flax.linen") for found in imports(path)):
        assert part_of(path) == "models"


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "data"], ids=name)
def test_data_workers_do_not_import_jax(path):
    libraries = {found.split(".")[0] for found in imports(path)}
    assert not libraries & {"jax", "flax", "optax", "orbax"}, "every worker would start a JAX"
    assert "tensorflow" not in libraries, "reading must work without TensorFlow"


@each_module
def test_only_the_command_line_prints_and_exits(path):
    if part_of(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="print" | "exit" | "quit" as found)):
                pytest.fail(f"{name(path)}:{node.lineno}: {found}")
            case ast.Attribute(value=ast.Name(id="sys"), attr="exit" | "argv" as found):
                pytest.fail(f"{name(path)}:{node.lineno}: sys.{found}")
            case ast.ImportFrom(module="sys", names=names):
                assert not {alias.name for alias in names} & {"exit", "argv"}, name(path)
            case ast.Raise(
                exc=ast.Name(id="SystemExit") | ast.Call(func=ast.Name(id="SystemExit"))
            ):
                pytest.fail(f"{name(path)}:{node.lineno}: SystemExit")


# Options of other programs.
FOREIGN_OPTIONS = {"--force-reinstall", "--shm-size"}


@each_module
def test_only_the_command_line_spells_options(path):
    """The library names parameters and settings; see `ghm_jax.exceptions`."""
    if part_of(path) in ("cli", "plots"):  # pages of plots have CSS variables
        return
    tree = ast.parse(path.read_text())
    docstrings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            options = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", node.value)) - FOREIGN_OPTIONS
            assert not options or node in docstrings, f"{name(path)}:{node.lineno}: {options}"


@each_module
def test_library_code_raises_instead_of_asserting(path):
    lines = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
    assert not lines, f"{name(path)}: python -O removes the asserts in lines {lines}"


SECTIONS = {
    type(getattr(Config(), field.name)).__name__: field.name
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(getattr(Config(), field.name))
} | {"Config": ""}


def settings_read(path: Path) -> set[str]:
    """Dotted names of the settings that a file reads.

    Follows `config.loss.box`, `loss = config.loss; loss.box` and `def f(x: Loss): x.box`. A section
    within a section, such as `loss.ghm_c`, is read if it is passed on as a whole.
    """
    tree = ast.parse(path.read_text())
    section_of = {"config": ""}  # what a variable holds

    def section(node: ast.expr | None) -> str | None:
        """The section that an expression is, '' for the whole config, None for anything else."""
        match node:
            case ast.Name(id=variable):
                return section_of.get(variable)
            case ast.Attribute(attr=attr) if attr in SECTIONS.values():
                return attr
        return None

    for node in ast.walk(tree):
        pairs = []
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                pairs = list(zip(targets, values, strict=False))
            case ast.Assign(targets=[target], value=value):
                pairs = [(target, value)]
            case ast.arg(arg=variable, annotation=ast.Name(id=kind) | ast.Attribute(attr=kind)):
                if kind in SECTIONS:
                    section_of[variable] = SECTIONS[kind]
        for target, value in pairs:
            if isinstance(target, ast.Name) and (held := section(value)) is not None:
                section_of[target.id] = held
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (base := section(node.value)) is not None:
            found.add(f"{base}.{node.attr}".lstrip("."))
    return found


READ = set().union(*(settings_read(path) for path in MODULES if path.name != "config.py"))


@pytest.mark.parametrize("key", flatten(Config()))
def test_every_setting_is_read_outside_config(key):
    whole = key.rpartition(".")[0] if key.count(".") > 1 else key
    assert {key, whole} & READ, f"nothing reads {key}: a setting that does nothing is a lie"


# Written so that this file does not find itself.
PRIVATE = {
    "a path of one machine": r"(?<![\w.~])/(work|root|home|Users|opt|mnt)/\w",
    "where packages come from": r"index[-_]url|find[-_]links|trusted[-_]host",
    "a private address": r"(?<![\d.])(10|192\.168)(\.\d{1,3}){2,3}(?![\d.])",
}


def test_files_name_no_machine_and_no_package_host():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git to tell the project's files from others")
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in filter(None, names.split("\0")):
        try:
            text = (ROOT / file).read_text()
        except (UnicodeDecodeError, FileNotFoundError):  # a picture; deleted but not committed
            continue
        for what, pattern in PRIVATE.items():
            hit = re.search(pattern, text)
            assert not hit, f"{file} names {what}: {hit.group()}"


def pins(file: str) -> dict[str, str]:
    """Package -> version that a lock file gives this Python."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if "==" in line[1:]]
    requirements = [Requirement(line) for line in lines if not line.lstrip().startswith("#")]
    return {
        r.name.lower(): str(r.specifier).removeprefix("==")
        for r in requirements
        if not r.marker or r.marker.evaluate()
    }


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("requirements.txt", ("detector", "test", "dev")),
        ("requirements-floor.txt", ("detector", "test")),
    ],
)
def test_lock_files_agree_with_pyproject(file, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    locked = pins(file)
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue
        version = locked.get(requirement.name.lower())
        assert version, f"{file} lacks {requirement.name}: make lock"
        assert version in requirement.specifier, f"{file}: {requirement} but {version}: make lock"


def test_the_floor_is_the_oldest_jax_and_flax_supported():
    floor = pins("requirements-floor.txt")
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("jax", "flax"):
        assert f'"{name}>={floor[name]}"' in text


def test_tests_see_eight_devices():
    """Without them a pmap test would pass on one device and show nothing."""
    assert jax.device_count() == 8

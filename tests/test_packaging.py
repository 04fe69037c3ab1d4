"""What a user installs: the wheel holds the package and its types, and works by itself."""

import email
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is in the extra dev")
    folder = tmp_path_factory.mktemp("wheel")
    # No isolation: nothing is downloaded.
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_type_marker(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "ghm_jax"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    assert modules | {"ghm_jax/py.typed"} <= held
    assert all(name.startswith("ghm_jax/") for name in held)


@pytest.mark.slow
def test_the_metadata_of_the_wheel_is_that_of_pyproject(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Version"] == PROJECT["version"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert {"cuda", "tpu"} <= set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_the_installed_wheel_gives_the_losses_to_a_fresh_process(wheel, tmp_path):
    target = tmp_path / "site"
    options = ("--no-deps", "--no-index", "--quiet", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    # Only JAX, NumPy and optax are needed: Flax or TFDS would be an error.
    program = """
import sys
for name in ("flax", "grain", "tensorflow_datasets", "orbax", "cv2"):
    sys.modules[name] = None
import jax.numpy as jnp
import ghm_jax
from ghm_jax.losses import ghm_c_loss
print(ghm_jax.__file__)
print(float(ghm_c_loss(jnp.zeros((4, 2)), jnp.array([0, 1, -1, -2]))[0]))
"""
    environment = os.environ | {"PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, loss = done.stdout.split()
    assert Path(where).is_relative_to(target)
    assert (target / "ghm_jax/py.typed").is_file()
    # Every probability is 1/2: one filled bin, plain cross-entropy.
    assert float(loss) == pytest.approx(0.6931472)


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert paper["title"] == "Gradient Harmonized Single-stage Detector"
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Liu", "Wang"]
    assert f"[{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()

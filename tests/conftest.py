"""What every test runs under: eight CPU devices, strict JAX settings, no display."""

import os

# In the environment, not by jax.config, so that the processes a test starts are the same; before
# jax is imported, because that is when it reads them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # so that pmap really splits its batch
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # (8,) against (8, 1) is nearly always a mistake
os.environ["MPLBACKEND"] = "agg"

import secrets
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fresh seed; a failing test shows the seed, GHM_TEST_SEED replays it."""
    seed = int(os.environ.get("GHM_TEST_SEED") or secrets.randbits(32))
    print(f"to replay: GHM_TEST_SEED={seed}")  # pytest shows it with a failure
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: golden numbers and small real data sets."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout")
    return folder

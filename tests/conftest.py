"""The setting of every test: eight CPU devices, strict JAX options, no display."""

import atexit
import contextlib
import ctypes
import gc
import os
import resource
import secrets
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

# In the environment, not by jax.config, so that the processes a test starts are the same; before
# jax is imported, because that is when it reads them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # so that pmap really splits its batch
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # (8,) against (8, 1) is nearly always a mistake
os.environ["MPLBACKEND"] = "agg"
# Most of the time is spent compiling: each program is compiled once. All workers share the
# directory that the first process makes.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="ghm-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


LONGEST = ("test_notebooks", "test_two_processes", "test_fault_injection", "test_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that the workers of `make test` finish together."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


class Memory:
    """Drops compiled programs before they fill the memory: JAX would keep them all, gigabytes."""

    ROOM = 500_000_000  # bytes that may come on top before the next time

    def __init__(self) -> None:
        self.limit = resident_bytes() + 2 * self.ROOM

    def trim(self) -> None:
        if resident_bytes() < self.limit:
            return
        import jax  # after the environment is set

        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # elsewhere the system takes its time
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.limit = resident_bytes() + self.ROOM


def resident_bytes() -> int:
    """Memory of this process; 0 if the system does not tell."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.is_file() else 0
    return pages * resource.getpagesize()


MEMORY = Memory()


def pytest_runtest_teardown() -> None:
    MEMORY.trim()


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fresh seed; a failing test shows the seed, GHM_TEST_SEED replays it."""
    seed = int(os.environ.get("GHM_TEST_SEED") or secrets.randbits(32))
    print(f"to replay: GHM_TEST_SEED={seed}")  # pytest shows it with a failure
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: small real data sets."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout")
    return folder


@pytest.fixture(scope="module")
def quick_compilation():
    """See `tiny.quick_compilation`."""
    from tiny import quick_compilation

    with quick_compilation():
        yield


@pytest.fixture(params=["64-bit", "strict"])
def number_types(request):
    """One of JAX's options on types of numbers; results must be the same under each."""
    import jax

    option, value = {
        "64-bit": ("jax_enable_x64", True),
        "strict": ("jax_numpy_dtype_promotion", "strict"),
    }[request.param]
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    yield request.param
    jax.config.update(option, before)


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory) -> Path:
    """A `data.dir` with the data set of `tiny`. Do not modify it."""
    from tiny import write_dataset

    return write_dataset(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def finished_run(dataset_dir, tmp_path_factory):
    """A completed run of `tiny_config`, its last state, and its listener. Do not modify it."""
    from tiny import Listener, quick_compilation, tiny_config

    from ghm_jax.runs.directory import RunDirectory
    from ghm_jax.train import train

    run, listener = RunDirectory(tmp_path_factory.mktemp("runs") / "finished"), Listener()
    with quick_compilation():
        state = train(tiny_config(dataset_dir), run.path, progress=listener)
    return run, state, listener


@pytest.fixture
def store():
    """A bucket on this machine; see `bucket_emulator`."""
    from bucket_emulator import running_store

    with running_store() as store:
        yield store

"""What a GPU or TPU must show, in order of value, within a few minutes.

    python -m experiments.accelerator_check --minutes 8

Numerics first, then the time of the losses, of the training step (beside torchvision's, compiled,
where it is installed) and of inference. Each part is a process of its own with a limit of time;
what is done stands in the JSON file at once, and what did not fit says so. `--small` is for a try
on a CPU.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro

from ghm_jax.runs.records import write_record

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "accelerator_check.json"


@dataclass(frozen=True)
class Part:
    """One command that writes JSON."""

    name: str
    words: tuple[str, ...]
    """After `python`; `--out FILE` is added."""
    share: float
    """Of the time, at most; what earlier parts leave is added."""


def parts(small: bool) -> list[Part]:
    """What is measured, in order of value."""
    bench = ("-c", "from ghm_jax.cli import main; main()", "bench")
    size = ("--size", "64", "64") if small else ("--size", "800", "1344")
    thin = ("--channels", "16") if small else ()
    network = "resnet10" if small else "resnet50"
    few = ("--repeats", "2") if small else ("--repeats", "10")
    once = (*size, *few, *thin)
    step = (*bench, "train", "--parts", "networks", "--backbones", network, *once)
    found = [
        Part("numerics", ("-m", "experiments.numerics", *(("--small",) if small else ())), 0.15),
        Part("losses", (*bench, "losses", *(("--sizes", "64", "64") if small else ()), *few), 0.15),
        Part("train_8", (*step, "--batch-size", "2" if small else "8"), 0.2),
        Part("train_16", (*step, "--batch-size", "4" if small else "16"), 0.15),
    ]
    if find_spec("torchvision") is not None and not small:
        peers = ("-m", "experiments.peers", "--torchvision", sys.executable, "--compile", *size)
        beside = (*peers, "--batch", "8", "--dtype", "bfloat16", "--rounds", "10")
        found.append(Part("torchvision", beside, 0.2))
    batch = ("--batch-size", "2") if small else ()
    inference = (*bench, "inference", "--backbone", network, *once, *batch)
    return [*found, Part("inference", inference, 0.15)]


def main(minutes: float = 8.0, small: bool = False, out: Path = RESULT) -> None:
    """Runs the parts one after the other and writes one JSON file as it goes."""
    end, results = time.monotonic() + 60 * minutes, dict[str, Any]()
    planned, left = parts(small), 0.0
    for part in planned:
        left += 60 * minutes * part.share
        start = time.monotonic()
        results[part.name] = run(part, min(left, end - start))
        left -= time.monotonic() - start
        # The parts say which device they used; this process must not take it from them.
        write_record(
            out,
            f"python -m experiments.accelerator_check --minutes {minutes:g}",
            {"parts": results},
            packages=("jax", "jaxlib", "torch", "torchvision"),
            device="see the parts",
        )
        said = results[part.name].get("failed", "done")
        print(f"{part.name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)


def run(part: Part, seconds: float) -> dict[str, Any]:
    """What a part wrote, or why it wrote nothing."""
    if seconds < 1:
        return {"failed": "no time left"}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "result.json"
        words = [sys.executable, *part.words, "--out", str(file)]
        try:
            done = subprocess.run(words, cwd=ROOT, timeout=seconds, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
        if done.returncode or not file.exists():
            return {"failed": (done.stderr.strip() or "no message").splitlines()[-1]}
        return json.loads(file.read_text())


if __name__ == "__main__":
    tyro.cli(main)

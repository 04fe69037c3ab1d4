"""Training steps of a RetinaNet-R50 in ours and in other libraries, side by side on this machine.

    python -m experiments.peers --torchvision .venv-torchvision/bin/python \\
        --keras-hub .venv-keras/bin/python

Each library runs in an environment of its own, whose interpreter is given; those not given are left
out. All are compiled first; then they take turns, one step each per round, so that other work on
the machine affects all alike. How to make the environments: docs/recipes.md.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import tyro

from ghm_jax.runs.records import write_record

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Peer:
    """A library in its own process, compiled and waiting."""

    name: str
    process: subprocess.Popen[str]
    first_step: float
    """Seconds to the end of the first step, from the start of the work: import is not counted."""
    versions: dict[str, str]
    """Of its environment."""
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    """Largest memory of the process so far."""

    def step(self) -> None:
        """One timed step."""
        sent = cast(IO[str], self.process.stdin)
        sent.write("\n")
        sent.flush()
        answer = read_line(self.name, self.process)
        self.seconds.append(answer["seconds"])
        self.peak_mib = answer["peak_mib"]

    def stop(self) -> None:
        """Ends its process."""
        self.process.kill()
        self.process.communicate()

    def row(self, reference: "Peer") -> dict[str, Any]:
        """What the table and the JSON file say; times relative to `reference` round by round."""
        ratios = [a / b for a, b in zip(self.seconds, reference.seconds, strict=True)]
        return {
            "peer": self.name,
            "seconds": statistics.median(self.seconds),
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "ratio": statistics.median(ratios),
            "first_step": self.first_step,
            "peak_mib": self.peak_mib,
            "versions": self.versions,
        }


def main(
    torchvision: str = "",
    keras_hub: str = "",
    size: tuple[int, int] = (256, 256),
    batch: int = 2,
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int = os.cpu_count() or 1,
    compile: bool = False,
    rounds: int = 7,
    out: str = "",
) -> None:
    """Times the peers and prints a table, ours first; `--compile` is `torch.compile`."""
    pythons = {"ghm_jax": sys.executable, "torchvision": torchvision, "keras_hub": keras_hub}
    options = ["--size", *map(str, size), "--batch", str(batch), "--dtype", dtype]
    options += ["--threads", str(threads)]
    options += ["--compile"] * compile
    peers = [start(name, python, options) for name, python in pythons.items() if python]
    try:
        for _ in range(rounds):
            for peer in peers:
                peer.step()
    finally:
        for peer in peers:
            peer.stop()
    rows = [peer.row(peers[0]) for peer in peers]
    print(f"{'':<14}{'s/step':>8}{'x ours':>8}{'fastest':>9}{'first step':>12}{'peak MiB':>10}")
    for row in rows:
        print(
            f"{row['peer']:<14}{row['seconds']:>8.3f}{row['ratio']:>8.2f}{row['fastest']:>9.3f}"
            f"{row['first_step']:>12.1f}{row['peak_mib']:>10.0f}"
        )
    if out:
        case = {"size": size, "batch": batch, "dtype": dtype, "threads": threads, "rounds": rounds}
        command = "python -m experiments.peers"
        write_record(out, command, {"case": case, "rows": rows}, packages=("jax", "jaxlib"))


def start(name: str, python: str, options: list[str]) -> Peer:
    """Starts a peer and waits until its first step is done."""
    process = subprocess.Popen(
        [python, "-m", "experiments.peers.steps", name, *options],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    answer = read_line(name, process)
    print(f"{name}: first step after {answer['first_step']:.1f} s", flush=True)
    return Peer(name, process, answer["first_step"], answer["versions"])


def read_line(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of figures; what libraries print of themselves is skipped."""
    for line in cast(IO[str], process.stdout):
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{name}: its process ended, see its message above")


if __name__ == "__main__":
    tyro.cli(main)

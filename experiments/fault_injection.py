"""Fault injection: kills at any moment, damaged files, a full disk, bad images, bad numbers.

    python -m experiments.fault_injection                        # 50 kills, and all other faults
    python -m experiments.fault_injection --kills 4 --repeats 1  # a quick version
    python -m experiments.fault_injection --store gs             # with the runs in a bucket

A tiny detector is trained once undisturbed and many times with faults, always by the real command
in a process of its own. A run survives a fault if the same command then resumes it and it ends
bit-identical in every array of the state and every line of the log (except times). Data is lost if
a complete checkpoint is gone or cannot be read afterwards.

The bucket is `experiments.local_bucket` (extra dev), with the data as well. Runs in it are compared
with one on the disk. Instead of a full disk it fails one request in five; bad images and numbers do
not meet it.

Prints a table; with --out FILE also writes it as JSON.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import jax
import numpy as np
import tyro

from ghm_jax.config import Anchors, Config, Data, Harmonizing, Loss, Model, Optimizer, Run
from ghm_jax.data import prepare_folder
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.runs.checkpoint import complete_steps
from ghm_jax.runs.directory import RunDirectory, load_run
from ghm_jax.runs.records import write_record
from ghm_jax.storage import as_path, is_bucket

EVERY = 5  # steps between checkpoints
MAIN = "from ghm_jax.cli import main; main()"
GHM_JAX = (sys.executable, "-c", MAIN)
TIMED = ("images_per_second", "seconds", "data_wait", "mfu")  # depend on wall time

config = Config(
    data=Data(name="squares", dir="", short_side=64, long_side=64, buckets=((64, 64),)),
    model=Model(
        backbone="resnet10", width=16, norm="group", channels=16, head_convs=0, dtype="float32"
    ),
    anchors=Anchors(scale=2.0, octaves=1, ratios=(1.0,)),
    loss=Loss(ghm_c=Harmonizing(bins=10), ghm_r=Harmonizing(bins=5, momentum=0.7)),
    optimizer=Optimizer(
        name="adamw",
        schedule="cosine",
        batch_size=4,
        steps=120,
        learning_rate=3e-3,
        warmup_steps=2,
        ema=0.99,
    ),
    run=Run(devices=1, workers=0, log_every=1, checkpoint_every=EVERY, keep=3),
)


@dataclasses.dataclass
class FaultResult:
    """Counts of one kind of fault."""

    fault: str
    tried: int = 0
    survived: int = 0
    data_lost: int = 0
    note: str = ""


class FaultInjector:
    """A folder with the data and the undisturbed run, and methods for the faults."""

    def __init__(self, folder: Path, seed: int, steps: int, bucket: Any = None) -> None:
        """`bucket`: a `local_bucket.Store` for runs and data; None: they are in the folder too."""
        self.folder, self.random, self.bucket = folder, random.Random(seed), bucket
        self.steps = steps
        draw_squares(folder / "images", broken=None)
        prepare(folder / "data", folder / "images")
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "GHM_JAX_CACHE": str(folder / "cache"),
        }
        self.runs, self.data = folder, str(folder / "data")
        done = self.train("undisturbed")
        if done.wait() != 0:
            raise SystemExit(f"the undisturbed run failed:\n{self.output('undisturbed')}")
        self.expected = outcome(folder / "undisturbed")
        if bucket is not None:
            self.runs, self.data = as_path("gs://bucket/runs"), "gs://bucket/data"
            images = folder / "images"
            source = [str(images), str(images / "instances.json")]
            command = ["data", "prepare", "folder", "--name", config.data.name, "--out", self.data]
            command += ["--train", *source, "--validation", *source]
            subprocess.run([*GHM_JAX, *command], env=self.environment, check=True)

    def train(self, name: str, *more: str, code: str = "") -> subprocess.Popen[bytes]:
        """Starts the command for the run `name`; `code` runs before it in the same process."""
        data = [] if "--data.dir" in more else ["--data.dir", self.data]
        args = ["train", __file__, "--run-dir", str(self.runs / name), *data, *more]
        args += ["--optimizer.steps", str(self.steps)]
        program = f"import sys; sys.argv[1:] = {args!r}\n{code}\n{MAIN}"
        with (self.folder / f"{name.replace('/', '-')}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", program], env=self.environment, stdout=log, stderr=log
            )

    def output(self, name: str) -> str:
        """The output of the command for a run so far."""
        return (self.folder / f"{name.replace('/', '-')}.log").read_text()

    def is_same(self, name: str) -> bool:
        """Whether a finished run is bit-identical to the undisturbed one."""
        return outcome(self.runs / name) == self.expected

    def kills(self, count: int) -> list[FaultResult]:
        """SIGKILL during startup, between steps, and while saving a checkpoint."""
        kinds = ("at any time", "in a step", "in a save")
        rows = {kind: FaultResult(f"SIGKILL {kind}") for kind in kinds}
        total = number = 0
        while total < count:
            number += 1
            name, killed = f"killed{number}", []
            while total + len(killed) < count:
                before = newest(self.runs / name)
                process = self.train(name)
                kind = self.random.choice(list(rows))
                if not self.kill(process, name, kind):
                    break
                killed.append(rows[kind])
                rows[kind].tried += 1
                rows[kind].data_lost += newest(self.runs / name) < before
            self.train(name).wait()
            same = self.is_same(name)
            # A checkpoint that looks complete but is not is skipped when the run resumes.
            rows["in a save"].data_lost += self.output(name).count("skipped the checkpoint")
            for row in killed:
                row.survived += same
            total += len(killed)
        rows["at any time"].note = f"{number} runs from start to end"
        return list(rows.values())

    def kill(self, process: subprocess.Popen[bytes], name: str, kind: str) -> bool:
        """Kills the process at a random moment of that kind; False if it had finished before."""
        run = RunDirectory(self.runs / name)
        before = size(run.history)
        longest = {"at any time": 8.0, "in a step": 1.0, "in a save": 0.05}[kind]
        if kind == "in a step":
            wait_until(lambda: size(run.history) != before, process)
        if kind == "in a save":
            old = unfinished(run)
            wait_until(lambda: unfinished(run) - old, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.random.uniform(0, longest))
        process.kill()
        return process.wait() == -signal.SIGKILL

    def damage(self, repeats: int) -> FaultResult:
        """A file of the newest checkpoint is truncated at a random byte, emptied, or removed."""
        row = FaultResult("a damaged file in the newest checkpoint", repeats)
        for number in range(repeats):
            name = f"damaged{number}"
            process = self.train(name)
            run = RunDirectory(self.runs / name)
            wait_until(lambda: len(whole(run.path)) >= 2, process)  # noqa: B023 (called here only)
            process.terminate()
            process.wait()
            last = run.checkpoints / str(newest(run.path))
            file = self.random.choice([f for f in files_in(last) if size(f)])
            keep = self.random.choice([0, self.random.randrange(size(file)), None])
            if keep is None:
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:keep])
            older = whole(run.path) - {last.name}
            code = self.train(name).wait()
            row.survived += code == 0 and self.is_same(name)
            row.data_lost += not older
        return row

    def full_disk(self) -> FaultResult:
        """The disk is too full for a checkpoint for a while."""
        row, name = FaultResult("a full disk", 1), "small/full"
        disk = self.folder / "small"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            note = "not tried: needs permission to mount a tmpfs"
            return dataclasses.replace(row, tried=0, note=note)
        try:
            process = self.train(name)
            wait_until(lambda: len(whole(self.folder / name)) >= 2, process)
            process.send_signal(signal.SIGSTOP)  # or a fast machine finishes its saves before
            before = whole(self.folder / name)
            with contextlib.suppress(OSError), (disk / "ballast").open("wb", 0) as ballast:
                while True:
                    ballast.write(bytes(4096))
            process.send_signal(signal.SIGCONT)
            wait_until(lambda: "a checkpoint could not be written" in self.output(name), process)
            row.data_lost += not whole(self.folder / name) & before
            (disk / "ballast").unlink()
            code = process.wait()
            row.survived += code == 0 and "a checkpoint could not be written" in self.output(name)
            row.survived *= outcome(self.folder / name)["state"] == self.expected["state"]
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)
        return row

    def busy_bucket(self) -> FaultResult:
        """The bucket answers one request in five with an error 503 or not at all."""
        row, faults = FaultResult("a bucket that fails one request in five", 2), self.bucket.faults
        for status in (503, 0):
            name = f"busy{status}"
            faults.every, faults.status, faults.failed = 5, status, 0
            code = self.train(name, "--run.checkpoint-every", str(self.steps // 2)).wait()
            row.note += f"{faults.failed} failed ({status or 'no answer'}) "
            faults.every = 0
            row.survived += code == 0 and self.is_same(name)
            row.data_lost += newest(self.runs / name) != self.steps
        return row

    def broken_image(self) -> FaultResult:
        """An image is truncated: the run names it, or replaces it if `data.on_error` says so."""
        row = FaultResult("an image that cannot be decoded", 2)
        draw_squares(self.folder / "cut", broken=7)
        prepare(self.folder / "cut_data", self.folder / "cut")
        data = ["--data.dir", str(self.folder / "cut_data")]
        code = self.train("refused", *data).wait()
        row.survived += code not in (0, -signal.SIGKILL) and "7.png" in self.output("refused")
        code = self.train("replaced", *data, "--data.on-error", "skip").wait()
        row.survived += code == 0
        return row

    def bad_numbers(self) -> list[FaultResult]:
        """A batch with NaN costs one update; a far too high learning rate stops with a message."""
        row = FaultResult("a NaN in one batch", 1)
        code = f"""
import jax.numpy as jnp
import ghm_jax.training.build
step = ghm_jax.training.build.train_step
def poisoned(state, batch, **how):
    images = jnp.where(state.step == {self.steps // 2}, jnp.nan, batch.images.astype("float32"))
    return step(state, batch._replace(images=images), **how)
ghm_jax.training.build.train_step = poisoned
"""
        if self.train("poisoned", code=code).wait() == 0:
            state = outcome(self.runs / "poisoned")["state"]
            row.survived = int(np.frombuffer(state[".skipped.total"], np.int32)[0] == 1)
        rate = FaultResult("a learning rate of 1e30", 1)
        code = self.train("diverged", "--optimizer.learning-rate", "1e30").wait()
        said = self.output("diverged").splitlines()[-1]
        rate.survived = int(code == 1 and "learning-rate" in said)
        rate.note = "the run stops with a message"
        return [row, rate]


def outcome(path: Path) -> dict[str, Any]:
    """What a finished run has computed: the bytes of its state, and its log except times."""
    try:
        run, resolved = load_run(path)
        state = restore_state(run, resolved, jax.devices()[0])
    except Exception as error:  # compares as different, whatever it is
        return {"state": {}, "error": repr(error)}
    leaves = jax.tree.leaves_with_path(state)
    records = [json.loads(line) for line in run.history.read_text().splitlines()]
    return {
        "state": {jax.tree_util.keystr(name): np.asarray(x).tobytes() for name, x in leaves},
        "log": [{k: v for k, v in record.items() if k not in TIMED} for record in records],
    }


def whole(path: Path) -> set[str]:
    """Names of the complete checkpoints of a run."""
    return set(map(str, complete_steps(path / "checkpoints")))


def unfinished(run: RunDirectory) -> set[str]:
    """Names of the checkpoints of a run that are being written."""
    there = {path.name for path in run.checkpoints.glob("*")}
    if is_bucket(run.path):
        return {name for name in there if name.isdigit()} - whole(run.path)
    return {name for name in there if "tmp" in name}


def files_in(directory: Path) -> list[Path]:
    """All files below a directory, in order."""
    if is_bucket(directory):
        return cast(Any, directory).objects()
    return sorted(path for path in directory.rglob("*") if path.is_file())


def newest(path: Path) -> int:
    """Steps done at the newest complete checkpoint, or -1."""
    return max(map(int, whole(path)), default=-1)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    """Returns when the condition holds or the process has finished."""
    while process.poll() is None and not condition():
        time.sleep(0.002)


def draw_squares(folder: Path, broken: int | None) -> None:
    """Twelve images of dark and light squares, with their COCO file; one may be truncated."""
    folder.mkdir(parents=True)
    rng, annotations = np.random.default_rng(0), []
    for number in range(12):
        image = rng.integers(110, 140, (64, 64, 3)).astype(np.uint8)
        for half in range(2):
            side = int(rng.integers(12, 28))
            x, y = 32 * half + int(rng.integers(32 - side)), int(rng.integers(64 - side))
            image[y : y + side, x : x + side] = (20, 235)[half]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": half + 1,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        data = cv2.imencode(".png", image)[1].tobytes()
        (folder / f"{number}.png").write_bytes(data[:2000] if number == broken else data)
    images = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in range(12)]
    categories = [{"id": 1, "name": "dark"}, {"id": 2, "name": "light"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def prepare(out: Path, images: Path) -> None:
    """The data set of the run."""
    source = (images, images / "instances.json")
    prepare_folder(config.data.name, out, {"train": source, "validation": source})


def main(
    kills: int = 50,
    repeats: int = 10,
    steps: int = 120,
    seed: int = 0,
    store: Literal["disk", "gs"] = "disk",
    out: Path | None = None,
) -> None:
    """Injects every kind of fault.

    Args:
        kills: number of SIGKILLs.
        repeats: number of damaged checkpoints.
        steps: of each run; a checkpoint after every fifth.
        seed: of the moments and files.
        store: where runs and data are.
        out: JSON file for the table.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        bucket = None
        if store == "gs":
            from experiments.local_bucket import running_store

            bucket = held.enter_context(running_store())
        injector = FaultInjector(Path(folder), seed, steps, bucket)
        rows = injector.kills(kills)
        rows += [injector.damage(repeats)]
        if bucket:
            rows += [injector.busy_bucket()]
        else:
            rows += [injector.full_disk(), injector.broken_image(), *injector.bad_numbers()]
    print(f"{'fault':<44}{'tried':>6}{'survived':>10}{'data lost':>11}")
    for row in rows:
        counts = f"{row.tried:>6}{row.survived:>10}{row.data_lost:>11}"
        print(f"{row.fault:<44}{counts}  {row.note}".rstrip())
    if out:
        command = f"python -m experiments.fault_injection --kills {kills} --repeats {repeats} "
        command += f"--steps {steps} --seed {seed}" + " --store gs" * (store == "gs")
        contents = {
            "seconds": round(time.perf_counter() - start),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        device = f"{os.cpu_count()} CPU cores"
        write_record(out, command, contents, packages=("jax",), device=device)
    if any(row.survived < row.tried or row.data_lost for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main)

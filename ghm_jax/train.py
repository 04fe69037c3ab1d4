"""Training a run: prepare, resume, loop, finish."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ghm_jax.analysis.cost import ideal_seconds
from ghm_jax.config import Config
from ghm_jax.data.dataset import Dataset, open_dataset
from ghm_jax.data.loader import Batches, train_batches, training_groups
from ghm_jax.data.order import Groups
from ghm_jax.data.summary import ReplacementLog, input_notes
from ghm_jax.data.workers import check_workers
from ghm_jax.distributed.devices import (
    REPLICA,
    Device,
    ProgramCount,
    choose_devices,
    jit_init,
    num_local,
    parallelize,
    replicate,
    split_batch,
)
from ghm_jax.distributed.processes import global_max, is_first, raise_together
from ghm_jax.evaluation.validation import Validation
from ghm_jax.exceptions import ArgumentError
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.checkpoint import Checkpoints, set_aside_damaged_notes
from ghm_jax.runs.directory import RunDirectory, claim_run, note_dataset
from ghm_jax.storage import as_path, telling_of_retries
from ghm_jax.training.build import Trainer, build
from ghm_jax.training.compilation import Step, compile_step
from ghm_jax.training.interrupt import StopRequest, TrainingInterrupted, stop_on_signal
from ghm_jax.training.log import TrainingDiverged, TrainingLog
from ghm_jax.training.metric_writers import check_writers
from ghm_jax.training.pretrained import load_backbone
from ghm_jax.training.profiling import Profiler
from ghm_jax.training.saving import Saver
from ghm_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that can start: everything that a user can get wrong has been checked."""

    run: RunDirectory
    config: Config
    """Resolved: with the name and the classes of the data set."""
    progress: Progress
    profile: tuple[int, int] | None
    devices: list[Device]
    dataset: Dataset
    groups: Groups
    """The images to train on, by bucket."""
    trainer: Trainer
    validation: Validation | None
    """Scores states during training; None: not requested."""
    pretrained: Mapping[str, Any] | None
    """Weights that a new run starts from."""

    @property
    def replicas(self) -> int:
        """Devices of this process."""
        return num_local(self.devices)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.optimizer.steps


def train(
    config: Config,
    run_dir: str | Path,
    *,
    restart: bool = False,
    profile: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> TrainState:
    """Trains a detector, or resumes a run that was stopped.

    Args:
        config: what to do.
        run_dir: where checkpoints, logs and the resolved config go; see `ghm_jax.runs.directory`.
        restart: move an existing run aside and train from scratch.
        profile: first and last step of a JAX profile, written next to TensorBoard's files.
        progress: receives progress updates.

    Returns:
        The state after the last step.

    Raises:
        UserError: the request cannot work; nothing has been computed.
        TrainingDiverged: too many consecutive updates held NaN or Inf.
        TrainingInterrupted: Ctrl-C or SIGTERM; the run can be resumed.
        CheckpointFailed: the last state could not be written; the run can be resumed from the
            previous checkpoint.
    """
    progress = progress if progress and is_first() else Silent()
    with raise_together():
        run = RunDirectory(as_path(run_dir))
    job = prepare(config, run, restart, profile, progress)
    step = compile_lazily(job)
    with (
        telling_of_retries(run.path, progress.say),
        claimed(job, restart),
        stop_on_signal(progress) as stopping,
        Checkpoints(job.run.checkpoints, job.config.run.keep, job.config.run.keep_best) as saved,
    ):
        state, start = resume(job, saved)
        if start >= job.steps:
            progress.say(
                f"{job.run.path}: complete at step {start}, nothing to train (use `restart` to "
                "train from scratch)"
            )
            return state
        buckets = tuple(job.groups)
        compile_step(step, state, job.config, buckets, job.replicas, progress)
        state, done, signal_number = loop(job, step, state, start, saved, stopping)
    if done < job.steps:
        raise TrainingInterrupted(
            f"stopped at step {done} of {job.steps}, checkpoint written", signal_number
        )
    return state


def prepare(
    config: Config,
    run: RunDirectory,
    restart: bool,
    profile: tuple[int, int] | None,
    progress: Progress,
) -> Job:
    """Checks everything that a user can get wrong, before any compute, except the directory.

    Raises:
        UserError: it cannot work; nothing has been written.
    """
    with raise_together():
        devices = choose_devices(config.run.devices)
        config.check(len(devices))
        check_writers(config)
        check_profile(profile, config.optimizer.steps)
        batch_size = config.optimizer.batch_size // jax.process_count()
        check_workers(config.data, batch_size, config.run.workers)
        dataset = open_dataset(config.data, config.data.train_split, progress)
        data = dataclasses.replace(config.data, name=dataset.name, classes=dataset.class_names)
        config = dataclasses.replace(config, data=data)
        trainer = build(config, len(dataset.class_names), REPLICA)
        trainer.check_losses()
        pretrained = None
        if config.model.weights and (restart or not run.has_checkpoint):
            blank = trainer.abstract_state
            like = {"params": blank.params, "batch_stats": blank.batch_stats}
            pretrained = load_backbone(config.model, like)
        return Job(
            run=run,
            config=config,
            progress=progress,
            profile=profile,
            devices=devices,
            dataset=dataset,
            groups=training_groups(dataset, config.data),
            trainer=trainer,
            validation=Validation(config, devices, progress) if config.run.eval_every else None,
            pretrained=pretrained,
        )


@contextlib.contextmanager
def claimed(job: Job, restart: bool) -> Iterator[None]:
    """The run's directory is this job's alone, and its checkpoints can be listed.

    Of several processes the first one locks and mends it.

    Raises:
        UserError: see `claim_run`.
    """
    with contextlib.ExitStack() as held:
        with raise_together():
            if is_first():
                say = job.progress.say
                held.enter_context(claim_run(job.run.path, job.config, restart=restart, say=say))
                set_aside_damaged_notes(job.run.checkpoints, say)
        yield


def check_profile(profile: tuple[int, int] | None, steps: int) -> None:
    """Raises ArgumentError for a first and a last step that the run does not have."""
    if profile and not 1 <= profile[0] <= profile[1] <= steps:
        raise ArgumentError(
            "profile",
            f"{profile[0]}:{profile[1]} are not steps of this run, which has {steps}",
            "give the first and the last one, such as 10:12",
        )


def compile_lazily(job: Job) -> Step:
    """The step of one replica, on all devices; compiled at its first call with a shape."""
    counted = ProgramCount(job.trainer.step, len(job.groups), job.progress.say)
    return parallelize(counted, job.devices, job.config.run.wrapper, donate=True)


def resume(job: Job, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The newest state that can be read, or the initial one, and its step.

    Damaged checkpoints that are newer are moved aside.
    """
    initial = jit_init(job.trainer.init_state, job.devices[0])(job.pretrained)
    # Placed as the step returns it: for another placement it would be compiled a second time.
    state = replicate(initial, job.devices)
    checkpoints.remove_fragments()
    new = checkpoints.latest is None
    if not new:
        damaged: list[int] = []

        def skipped(step: int, why: str) -> None:
            damaged.append(step)
            job.progress.say(f"skipped the checkpoint of step {step}: {why}")

        state = checkpoints.restore(state, skipped=skipped)
        for step in damaged:
            job.progress.say(f"... and moved it to {checkpoints.set_aside(step)}")
    start = int(state.step)  # 0: an imported detector
    if start < job.steps:
        devices = job.devices
        job.progress.say(
            f"{job.run.path}: {'new run' if new else f'resuming at step {start}'} of {job.steps} "
            f"steps on {len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}, "
            f"{len(job.dataset)} images of {job.dataset.name}"
        )
        if is_first():
            warning = note_dataset(job.run, len(job.dataset), job.dataset.checksum)
            if warning and not new:
                job.progress.say(warning)
        for note in input_notes(job.dataset, job.config):
            job.progress.say(note)
    return state, start


def loop(
    job: Job,
    step: Step,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    stopping: StopRequest,
) -> tuple[TrainState, int, int]:
    """Trains until the last step or a signal, and saves the last state.

    Returns:
        The state, the steps done, and the signal (0: none).
    """
    config, done, signal_number = job.config, start, 0
    saver = Saver(
        checkpoints,
        job.progress,
        every=config.run.checkpoint_every,
        retry_after=config.run.log_every,
        alone=jax.process_count() == 1,
        place=functools.partial(replicate, devices=job.devices),
    )
    with logging(job, start, checkpoints) as (log, profiler, batches):
        replacements = ReplacementLog(job.progress.say)
        while done < job.steps:
            # All processes must stop at the same step; asking them makes the loop wait.
            if jax.process_count() == 1 or done % config.run.log_every == 0:
                signal_number = global_max(stopping.number)
            if signal_number:
                break
            profiler.before(done + 1)
            loaded = log.next_batch(batches)
            replacements.record(loaded)
            state, metrics = step(state, split_batch(loaded.batch, job.replicas))
            done += 1
            profiler.after(done, metrics)
            log.record(done, metrics)
            ap = evaluate_if_due(job, log, state, done)
            # A logged step is checked for NaN and Inf before its state is saved.
            saver.save_if_due(done, state, ap=ap, before=log.before_checkpoint)
        log.before_checkpoint()
        saver.save_last(done, state)
    return state, done, signal_number


@contextlib.contextmanager
def logging(
    job: Job, start: int, checkpoints: Checkpoints
) -> Iterator[tuple[TrainingLog, Profiler, Batches]]:
    """What a loop writes to and reads from; closed however it ends."""
    config = job.config
    kinds = [device.device_kind for device in job.devices]
    ideal = ideal_seconds(config, len(job.dataset.class_names), job.groups, kinds)
    log = TrainingLog(job.run, config, start, job.progress, ideal)
    profile = job.profile if is_first() else None
    place, shown = log.growing.tensorboard, job.run.tensorboard
    profiler = Profiler(place, profile, job.progress.say, shown)
    process, processes = jax.process_index(), jax.process_count()
    batches = train_batches(job.dataset, config, start, process, processes, groups=job.groups)
    try:
        yield log, profiler, batches
    except TrainingDiverged as diverged:
        newest = checkpoints.latest
        kept = "there is no checkpoint" if newest is None else f"checkpoint {newest} is kept"
        raise TrainingDiverged(f"{diverged} ({kept})") from None
    finally:
        profiler.close()
        batches.close()
        log.close()
        job.progress.close()


def evaluate_if_due(job: Job, log: TrainingLog, state: TrainState, done: int) -> float | None:
    """The AP of the state on the validation split, which is logged; None: not this step."""
    every = job.config.run.eval_every
    if job.validation is None or not (done % every == 0 or done == job.steps):
        return None
    log.flush()
    figures, pictures = job.validation.score(state, job.progress)
    log.evaluated(done, figures, pictures)
    return figures["AP"]

"""Training, in reading order."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ghm_jax.analysis.cost import ideal_seconds
from ghm_jax.config import Config
from ghm_jax.data.batching import collate, filler_example
from ghm_jax.data.dataset import open_dataset
from ghm_jax.data.loader import train_batches, training_groups
from ghm_jax.data.summary import ReplacementLog, input_notes
from ghm_jax.distributed.devices import (
    REPLICA,
    ProgramCount,
    choose_devices,
    compile_to_run_once,
    num_local,
    parallelize,
    replicate,
    split_batch,
)
from ghm_jax.distributed.processes import all_or_none, is_first, largest
from ghm_jax.evaluation.validation import Validation
from ghm_jax.exceptions import ConfigError
from ghm_jax.progress import Progress, Silent
from ghm_jax.runs.checkpoint import CheckpointFailed, Checkpoints
from ghm_jax.runs.directory import RunDirectory, claim_run
from ghm_jax.runs.storage import set_aside
from ghm_jax.training.build import make_model
from ghm_jax.training.interrupt import TrainingInterrupted, stop_on_signal
from ghm_jax.training.log import TrainingDiverged, TrainingLog
from ghm_jax.training.metric_writers import check_boards
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.pretrained import load_backbone
from ghm_jax.training.profiling import Profiler
from ghm_jax.training.state import TrainState, init_state
from ghm_jax.training.step import train_step


def train(
    config: Config,
    run_dir: str | Path,
    *,
    restart: bool = False,
    profile: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> TrainState:
    """Trains a detector, or goes on with a run that was stopped.

    Args:
        config: what to do.
        run_dir: where checkpoints, logs and the resolved config go; see `ghm_jax.runs.directory`.
        restart: move an existing run aside and start anew.
        profile: first and last step of which a JAX profile is written, beside TensorBoard's files.
        progress: who hears about it.

    Returns:
        The state after the last step.

    Raises:
        ConfigError: something that was asked for cannot work; nothing has been computed.
        TrainingDiverged: too many updates in a row were not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; the run can be resumed.
        CheckpointFailed: the last state could not be written; the run can be resumed from the one
            before.
    """
    run, processes = RunDirectory(Path(run_dir)), jax.process_count()
    progress = progress if progress and is_first() else Silent()

    # Everything that a person can get wrong, before any compute.
    with all_or_none():
        devices = choose_devices(config.run.devices)
        config.check(len(devices))
        check_boards(config)
        if profile and not 1 <= profile[0] <= profile[1] <= config.optimizer.steps:
            raise ConfigError(
                f"--profile: {profile[0]}:{profile[1]} are not steps of this run, which has "
                f"{config.optimizer.steps}; give the first and the last one, such as 10:12"
            )
        dataset = open_dataset(config.data, config.data.train_split)
        data = dataclasses.replace(config.data, name=dataset.name, classes=dataset.class_names)
        config = dataclasses.replace(config, data=data)
        groups = training_groups(dataset, config.data)
        notes = input_notes(dataset, config)
        validation = Validation(config, devices) if config.run.eval_every else None
        optimizer = make_optimizer(config)
        model = make_model(config, len(dataset.class_names), REPLICA)
        initialize = functools.partial(init_state, config, model, optimizer)
        pretrained = None
        if config.model.weights and (restart or not run.has_checkpoint):
            blank = jax.eval_shape(initialize)
            like = {"params": blank.params, "batch_stats": blank.batch_stats}
            pretrained = load_backbone(config.model, like)
    with all_or_none():
        if is_first():
            if restart and run.path.exists():
                progress.say(f"moved the old run to {set_aside(run.path)}")
            claim_run(run_dir, config)

    # The step of one replica, on all devices.
    step = functools.partial(
        train_step, config=config, model=model, optimizer=optimizer, axis_name=REPLICA
    )
    step = ProgramCount(step, len(groups), progress.say)
    step = parallelize(step, devices, config.run.wrapper, donate=True)
    state = compile_to_run_once(initialize, devices[0])(pretrained)
    # As the step returns it: from another placement it would be compiled a second time.
    state = replicate(state, devices)
    # pmap of several processes gives each a state of its own, all the same; Orbax wants one.
    shared = functools.partial(replicate, devices=devices)

    with (
        stop_on_signal(progress) as stopping,
        Checkpoints(run.checkpoints, config.run.keep, config.run.keep_best) as checkpoints,
    ):
        checkpoints.remove_fragments()
        new = checkpoints.latest is None
        if not new:
            state = restore(checkpoints, state, progress)
        start, total = int(state.step), config.optimizer.steps  # 0: an imported detector
        if start >= total:
            progress.say(
                f"{run.path}: complete at step {start}, nothing to train (--restart: anew)"
            )
            return state
        progress.say(
            f"{run.path}: {'new run' if new else f'resuming at step {start}'} of {total} steps on "
            f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}, "
            f"{len(dataset)} images of {dataset.name}"
        )
        for note in notes:
            progress.say(note)
        compile_step(step, state, config, tuple(groups), num_local(devices), progress)

        done, retry, signal_number = start, None, 0
        kinds = [device.device_kind for device in devices]
        ideal = ideal_seconds(config, len(dataset.class_names), groups, kinds)
        log = TrainingLog(run, config, start, progress, ideal)
        profiler = Profiler(run.tensorboard, profile if is_first() else None, progress.say)
        replacements = ReplacementLog(progress.say)
        batches = train_batches(
            dataset, config, start, jax.process_index(), processes, groups=groups
        )
        try:
            while done < total:
                # All processes must stop at the same step; to ask them costs a wait.
                if processes == 1 or done % config.run.log_every == 0:
                    signal_number = largest(stopping.number)
                if signal_number:
                    break
                profiler.before(done + 1)
                loaded = log.next_batch(batches)
                replacements.record(loaded)
                state, metrics = step(state, split_batch(loaded.batch, num_local(devices)))
                done += 1
                profiler.after(done, metrics)
                log.record(done, metrics)
                ap = None
                if validation and (done % config.run.eval_every == 0 or done == total):
                    log.flush()
                    figures, pictures = validation.score(state, progress)
                    log.evaluated(done, figures, pictures)
                    ap = figures["AP"]
                try:
                    checkpoints.check()
                    if done % config.run.checkpoint_every == 0 or ap is not None or done == retry:
                        log.flush()  # so that a logged step is checked before its state is saved
                        checkpoints.save(done, shared(state), ap)
                except CheckpointFailed as failed:
                    if processes > 1:  # the others do not know, and cannot be asked
                        raise
                    retry = done + config.run.log_every
                    progress.say(
                        f"a checkpoint was not written ({failed}); older ones are kept, the next "
                        f"try is at step {retry}"
                    )
            log.flush()
            save_last(checkpoints, done, shared(state), progress, tries=3 if processes == 1 else 1)
        except TrainingDiverged as diverged:
            newest = checkpoints.latest
            kept = "there is no checkpoint" if newest is None else f"checkpoint {newest} is kept"
            raise TrainingDiverged(f"{diverged} ({kept})") from None
        finally:
            profiler.close()
            batches.close()
            log.close()
            progress.close()
    if done < total:
        raise TrainingInterrupted(
            f"stopped at step {done} of {total}, checkpoint written", signal_number
        )
    return state


def compile_step(
    step: Callable[[Any, Any], Any],
    state: TrainState,
    config: Config,
    buckets: tuple[tuple[int, int], ...],
    replicas: int,
    progress: Progress,
) -> None:
    """Compiles the step for each bucket, by doing one with images that are all padding.

    Training then never stops for it, and what the memory cannot hold shows now. `step` may take
    the memory of the state that it is given: it gets a copy.
    """
    size = config.optimizer.batch_size // jax.process_count()
    for number, bucket in enumerate(buckets, 1):
        progress.say(
            f"compiling the training step for images of {bucket[0]}x{bucket[1]} pixels"
            f"{f' ({number} of {len(buckets)})' * (len(buckets) > 1)}, half a minute or so ..."
        )
        start = time.perf_counter()
        padding = collate([filler_example()] * size, bucket, config.data.max_boxes)
        copy = jax.tree.map(jnp.copy, state)
        jax.block_until_ready(step(copy, split_batch(padding.batch, replicas)))
        progress.say(f"... ready after {time.perf_counter() - start:.0f} s")


def restore(checkpoints: Checkpoints, like: TrainState, progress: Progress) -> TrainState:
    """The newest state that can be read; damaged ones that are newer are put aside."""
    damaged: list[int] = []

    def skipped(step: int, why: str) -> None:
        damaged.append(step)
        progress.say(f"the checkpoint of step {step} is skipped: {why}")

    state = checkpoints.restore(like, skipped=skipped)
    for step in damaged:
        progress.say(f"... and moved to {checkpoints.set_aside(step)}")
    return state


def save_last(
    checkpoints: Checkpoints,
    done: int,
    state: TrainState,
    progress: Progress,
    tries: int = 3,
    pause: float = 10.0,
) -> None:
    """Saves and waits for it; tries again after `pause` seconds, as a disk may be full for a while.

    Raises:
        CheckpointFailed: the last try failed.
    """
    for left in reversed(range(tries)):
        try:
            checkpoints.save(done, state)
            checkpoints.wait()
            return
        except CheckpointFailed as failed:
            if not left:
                raise CheckpointFailed(
                    f"step {done} could not be saved ({failed}); the newest checkpoint is that of "
                    f"step {checkpoints.latest}: make room and give the same command to go on there"
                ) from failed
            progress.say(f"step {done} was not saved ({failed}), trying again in {pause:.0f} s")
            time.sleep(pause)

"""One attempt at a run, as a recipe: find where the run stands, build its parts, train, record how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from ddpm_dist.backends import configure_backends
from ddpm_dist.build import build_batches, check_own_network, size_divisor
from ddpm_dist.config import Config, check_world_size, loader_workers
from ddpm_dist.data import datasets
from ddpm_dist.data.batches import iterate
from ddpm_dist.data.images import Images
from ddpm_dist.errors import ConfigError, ExitCode, StopRequested
from ddpm_dist.parallel.connection import pick_device
from ddpm_dist.parallel.environment import RankEnvironment, cpu_threads
from ddpm_dist.parallel.failures import FailedElsewhere, Failure, RankZeroFailed, is_lost_contact
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.reduction import shards_of
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.run.preemption import StopSignal
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.training.assembly import build_trainer
from ddpm_dist.training.canary import canary
from ddpm_dist.training.clock import Clock
from ddpm_dist.training.contract import check_images, hold_to_contract, numerics_of
from ddpm_dist.training.ending import conclude, name_of
from ddpm_dist.training.loop import Loop
from ddpm_dist.training.origin import Origin
from ddpm_dist.training.recorder import Recorder, SilentRecorder, rank_zero_recorder
from ddpm_dist.training.resume import find_resume_point, settle_contract
from ddpm_dist.training.start import Start, adopt_snapshots, how_to_start
from ddpm_dist.training.step import Trainer
from ddpm_dist.training.tasks import TASKS, Save, TaskContext


class Ending(NamedTuple):
    """How an attempt ended, and what rank 0 has still to do once all ranks have left."""

    code: ExitCode
    deliver: Callable[[ExitCode], None] = lambda code: None


def run_session(config: Config, env: RankEnvironment, stop: StopSignal) -> ExitCode:
    """Start, resume or finish the run. Collective.

    Args:
        config: of the run, the same on every rank.
        env: which rank this is, and how it was launched.
        stop: knows whether a stop signal has come.

    Returns:
        FINISHED or PREEMPTED.

    Raises:
        UserError: something that the user can mend; the caller prints it.
        RankZeroFailed: on other ranks, for the error that rank 0 reports.
        Exception: whatever else ends the attempt. It is already in status.json, as far as that could be written.
    """
    check_world_size(config, env.world_size)
    device, bitwise = _device(config, env), config.elastic.mode == "bitwise"
    configure_backends(config.train, config.train.threads or (1 if bitwise else cpu_threads(env)), bitwise)
    ranks = Ranks(env, device, config.distributed.timeout_seconds, stop.requested)
    attempt = Attempt(RunDirectory(config.directory), ranks.world_size, ranks.nodes)
    if (watchdog := ranks.watchdog) is not None:
        watchdog.last_words = lambda reason: _last_words(reason, watchdog.silent, ranks, attempt)
    try:
        ending = _train(config, ranks, stop, attempt)
    except StopRequested:
        attempt.stop_early(f"stopped by {name_of(stop)} before its first step")
        ending = Ending(ExitCode.PREEMPTED)
    except BaseException as raised:
        _fail(raised, ranks, attempt)
    attempt.release()
    ranks.leave()
    ending.deliver(ending.code)
    return ending.code


def _device(config: Config, env: RankEnvironment) -> torch.device:
    """The device of this rank.

    All ranks of a node find the same error. The first one raises it as a ConfigError, the others as RankZeroFailed.
    """
    try:
        return pick_device(config.train.device, env)
    except ConfigError as error:
        if env.local_rank == 0:
            raise
        time.sleep(2)  # when a rank exits, the launcher kills the others: rank 0 of the node must print first
        raise RankZeroFailed(error.exit_code) from None


def _train(config: Config, ranks: Ranks, stop: StopSignal, attempt: Attempt) -> Ending:
    """The recipe. Collective."""
    store = CheckpointStore(attempt.directory.checkpoints, attempt.check)
    point, saved = find_resume_point(config, ranks, attempt, store)
    if point.finished:
        if ranks.is_zero:
            print(f"{attempt.directory.path} is finished at step {point.step}: there is nothing to do")
        return Ending(ExitCode.FINISHED)
    images = _load_images(config, ranks, saved)
    attempt.target = config.target(len(images))
    origin = point.starts_from()
    contract = _contract(config, ranks, images, attempt.target, origin, saved)
    trained = saved[0].model if saved and origin is None else None  # `how_to_start` compares those of a branch
    ranks.all_succeed(lambda: check_own_network(config, images, ranks.device, trained))
    start = ranks.all_succeed(lambda: how_to_start(origin, saved, config, images, attempt.target, contract))
    if not ranks.is_zero:
        return Ending(_build_and_fit(config, ranks, attempt, images, contract, start, SilentRecorder()))
    attempt.begin(config, dataclasses.asdict(origin) if origin else None)
    with rank_zero_recorder(config, ranks, attempt, store, point, contract) as recorder:
        for line in start.lines:
            recorder.say(line)
        code = _build_and_fit(config, ranks, attempt, images, contract, start, recorder)
        conclude(code, stop, attempt, recorder)
    return Ending(code, recorder.deliver)


def _load_images(config: Config, ranks: Ranks, saved: list[Checkpoint]) -> Images:
    """The images, the same on every rank. Rank 0 downloads them first if they are not there. Collective."""
    labels = config.model.class_labels
    ranks.on_rank_zero(lambda should_stop: datasets.prepare(config.data, labels))
    shape = saved[0].contract["image_shape"] if saved else None
    divisor = size_divisor(config)
    return ranks.all_succeed(lambda: datasets.load(config.data, shape, divisor=divisor, labels=labels))


def _contract(
    config: Config, ranks: Ranks, images: Images, target: int, origin: Origin | None, saved: list[Checkpoint]
) -> dict[str, Any]:
    """The contract, the same on every rank, after a check that the images are those of the run. Collective."""
    checkpoint = saved[0] if saved else None
    contract: dict[str, Any] = ranks.on_rank_zero(
        lambda should_stop: settle_contract(config, images, target, checkpoint, origin, ranks.device)
    )
    ranks.all_succeed(lambda: check_images(images, contract, config.data.root))
    return contract


def _build_and_fit(
    config: Config,
    ranks: Ranks,
    attempt: Attempt,
    images: Images,
    contract: dict[str, Any],
    start: Start,
    recorder: Recorder,
) -> ExitCode:
    """Build the trainer, and train until the target or a stop signal. Collective.

    The recorder is open already, so that MLflow learns of an attempt that fails while the trainer is built.
    """
    trainer = _build(config, ranks, images, contract, start, recorder)
    return _fit(config, attempt, trainer, images, contract, start, recorder)


def _build(
    config: Config,
    ranks: Ranks,
    images: Images,
    contract: dict[str, Any],
    start: Start,
    recorder: Recorder,
) -> Trainer:
    """A trainer at the step where the run stands, after this machine was held against the contract. Collective."""
    numerics = numerics_of(contract)
    trainer = build_trainer(config, ranks, numerics, images.shape, images.num_classes, contract["decay_steps"])
    rounds_like = ""
    if trainer.reduction.repeats_on(ranks.device):
        rounds_like = canary(trainer, images, config.run.seed, config.diffusion.num_timesteps)
    warning = hold_to_contract(contract, rounds_like, ranks, config, start.step)
    if warning:
        recorder.say(warning)
    trainer.warm_up(images)
    start.load(trainer)
    return trainer


def _fit(
    config: Config,
    attempt: Attempt,
    trainer: Trainer,
    images: Images,
    contract: dict[str, Any],
    start: Start,
    recorder: Recorder,
) -> ExitCode:
    """Train until the target or a stop signal. Collective."""
    ranks = trainer.ranks
    batches = build_batches(config, shards_of(ranks, config.elastic.shards), images)
    context = TaskContext(
        config, trainer, attempt, recorder, Clock(trainer.step), contract, images.shape, batches.steps_per_epoch
    )
    coming = iterate(
        batches, trainer.step, attempt.target, loader_workers(config.data), pin_memory=ranks.device.type == "cuda"
    )
    # Closing ends the loader's worker processes. If they lived on, the exit of this process would wait for them.
    with contextlib.closing(coming):
        parts = (trainer.placement.micro_batches(batch, trainer.reduction.num_micro_batches) for batch in coming)
        save = Save(context)
        if (origin := start.origin) is not None:
            ranks.on_rank_zero(lambda should_stop: adopt_snapshots(origin, attempt))
            save.run_and_wait()  # from here on, a resume does not need what the run started from
        finished = Loop(trainer, parts, attempt, recorder, [make(context) for make in TASKS], save).fit()
    return ExitCode.FINISHED if finished else ExitCode.PREEMPTED


def _fail(raised: BaseException, ranks: Ranks, attempt: Attempt) -> NoReturn:
    """End this attempt: record the error, release the run, and raise the error.

    Raises:
        RankLost: in place of an error that only says that another rank is gone; it names the silent ranks.
        FailedElsewhere: in place of that, on rank 0, if the other rank has said that trying again is of no use.
        BaseException: any other error, as it was raised.
    """
    try:
        error = ranks.lost(raised) if is_lost_contact(raised) else raised
        code = _tell(error, ranks, attempt)
        if is_lost_contact(error) and code != ExitCode.SOFTWARE:
            error = FailedElsewhere(code)
    finally:
        attempt.release()
    if ranks.failure_is_shared:
        ranks.leave()
    if error is raised:
        raise raised  # and not `from` anything, which would replace its own cause
    raise error from raised


def _tell(error: BaseException, ranks: Ranks, attempt: Attempt) -> int:
    """Record an error where others will look for it: rank 0 in the run directory, other ranks in the ranks' store.

    Returns:
        The exit code that is recorded: on rank 0 that of another rank, if that one has said why it ends.
    """
    code = int(getattr(error, "exit_code", ExitCode.SOFTWARE))
    reason = " ".join(f"{type(error).__name__}: {error}".split()) if code == ExitCode.SOFTWARE else str(error)
    if not ranks.is_zero:
        if not isinstance(error, RankZeroFailed) and not is_lost_contact(error):
            ranks.report_failure(code, reason)
        return code
    failure = Failure(code, reason, getattr(error, "ranks", ()))
    if is_lost_contact(error):
        failure = ranks.reported_failure() or dataclasses.replace(failure, reason=str(error))
    attempt.fail(failure.exit_code, failure.reason, _node_at_fault(failure, ranks))
    return failure.exit_code


def _last_words(reason: str, silent: tuple[int, ...], ranks: Ranks, attempt: Attempt) -> None:
    """Rank 0: record why this attempt fails. The watchdog calls it from its thread, before it ends the process.

    Args:
        silent: the ranks that have not been heard of for too long.
    """
    if ranks.is_zero:
        failure = ranks.reported_failure() or Failure(ExitCode.SOFTWARE, reason, silent)
        attempt.fail(failure.exit_code, failure.reason, _node_at_fault(failure, ranks))
        attempt.release()


def _node_at_fault(failure: Failure, ranks: Ranks) -> str | None:
    """The node of the ranks at fault; None if they sit on several nodes.

    When one rank ends the job, ranks of several nodes fall silent, and none of these nodes need be at fault.
    """
    nodes = {ranks.nodes[rank] for rank in failure.ranks}
    return nodes.pop() if len(nodes) == 1 else None

"""One attempt at a run: decide where it stands, build the parts, train, leave the truth on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from ddpm_dist.command import one_line
from ddpm_dist.config import Config, check_world_size, to_yaml
from ddpm_dist.data import datasets
from ddpm_dist.data.batches import iterate
from ddpm_dist.data.datasets import Images
from ddpm_dist.errors import ConfigError, ExitCode, StopRequested, TakenOver
from ddpm_dist.evaluation.pictures import save_curves
from ddpm_dist.parallel.connection import pick_device
from ddpm_dist.parallel.environment import RankEnvironment, cpu_threads
from ddpm_dist.parallel.failures import Failure, RankZeroFailed, is_lost_contact
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import Attempt, RunDirectory
from ddpm_dist.run.preemption import StopSignal
from ddpm_dist.run.saver import Saver
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.tracking.journal import Journal, read_metrics
from ddpm_dist.tracking.process import ShipperProcess
from ddpm_dist.training.build import build_batches, build_trainer
from ddpm_dist.training.contract import check_images, hold_to_contract, numerics_of
from ddpm_dist.training.loop import Loop
from ddpm_dist.training.precision import configure_backends
from ddpm_dist.training.progress import Progress
from ddpm_dist.training.start import Start, Starter
from ddpm_dist.training.trainer import Trainer


def run_job(config: Config, env: RankEnvironment, stop: StopSignal) -> ExitCode:
    """Start, resume or finish the run. Every rank calls it.

    Returns:
        FINISHED or PREEMPTED.

    Raises:
        UserError: what the user can mend; reported on rank 0 by the caller.
        RankZeroFailed: on other ranks, for what rank 0 reports.
    """
    check_world_size(config, env.world_size)
    device = _device(config, env)
    bitwise = config.elastic.mode == "bitwise"
    configure_backends(config.train, config.train.threads or (1 if bitwise else cpu_threads(env)), bitwise)
    ranks = Ranks(env, device, config.distributed.timeout_seconds, stop.requested)
    job = Job(config, ranks, stop)
    try:
        code = job.run()
    except BaseException as error:
        if isinstance(error, StopRequested):  # while it waited for its turn: nothing has begun
            code = ExitCode.PREEMPTED
        else:
            error = ranks.lost(error) if is_lost_contact(error) else error
            job.fail(error)
            if ranks.failure_is_shared:
                ranks.leave()
            raise error
    finally:
        job.release()
    ranks.leave()
    job.wait_for_tracking(code)
    return code


def _device(config: Config, env: RankEnvironment) -> torch.device:
    """A node's ranks all find the same error; the first of them says it."""
    try:
        return pick_device(config.train.device, env)
    except ConfigError as error:
        if env.local_rank == 0:
            raise
        time.sleep(2)  # the first rank to exit has the launcher kill the others
        raise RankZeroFailed(error.exit_code) from None


class Job:
    """The parts of one attempt, in the order in which they come into being."""

    def __init__(self, config: Config, ranks: Ranks, stop: StopSignal) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.directory = RunDirectory(config.directory)
        self.store = CheckpointStore(self.directory.checkpoints, lambda: self.directory.fence())
        self.starter = Starter(config, self.directory, self.store, ranks.world_size, ranks.nodes)
        self.saver: Saver | None = None
        if ranks.watchdog is not None:
            ranks.watchdog.last_words = self._end_wordless
        self._ended: dict[str, Any] = {}
        self.attempt: Attempt | None = None
        self.trainer: Trainer | None = None
        self.shipper: ShipperProcess | None = None

    def run(self) -> ExitCode:
        config, ranks = self.config, self.ranks
        start = Start(**ranks.on_rank_zero(lambda should_stop: dataclasses.asdict(self.starter.find(should_stop))))
        if start.finished:
            if ranks.is_zero:
                print(f"{self.directory.path} is finished: step {start.saved_step} reached its target; nothing to do")
            return ExitCode.FINISHED
        ranks.on_rank_zero(lambda should_stop: datasets.prepare(config.data))
        checkpoint = ranks.all_succeed(lambda: self.starter.load(start))
        image_shape = checkpoint.contract["image_shape"] if checkpoint else None
        images = ranks.all_succeed(lambda: datasets.load(config.data, image_shape))
        target = self.starter.target(len(images))
        contract = ranks.on_rank_zero(
            lambda should_stop: self.starter.contract(images, target, checkpoint, ranks.device)
        )
        ranks.all_succeed(lambda: check_images(images, contract, config.data.root))

        self.attempt = Attempt(
            self.directory,
            start.attempt,
            target,
            ranks.world_size,
            start.saved_step,
            self.starter.lease,
            start.without_progress,
        )
        step = checkpoint.step if checkpoint else 0
        with self._outputs(step, start) as (journal, progress):
            loop = self._build(images, contract, checkpoint, journal, progress)
            checkpoint = None  # as large as the weights, their average and Adam's moments
            # Loader workers end here: left to the interpreter's exit they would be waited for in vain.
            with contextlib.closing(loop.batches):
                finished = loop.fit()
            return self.end(ExitCode.FINISHED if finished else ExitCode.PREEMPTED)

    @contextlib.contextmanager
    def _outputs(self, step: int, start: Start) -> Iterator[tuple[Journal | None, Progress]]:
        """Rank 0's files and words; nothing on other ranks."""
        assert self.attempt is not None
        progress = Progress(self.ranks.is_zero, step, self.attempt.target)
        if not self.ranks.is_zero:
            yield None, progress
            return
        self.attempt.write("running", step, "training")
        self.directory.write_config(self.config)
        journal = Journal(self.directory.metrics_file, self.directory.fence)
        self.saver = Saver(
            self.store, self.config.checkpoint, journal.sync, on_commit=self.attempt.committed, say=progress.say
        )
        progress.say(to_yaml(self.config).rstrip())
        for change in start.changed:
            progress.say(f"changed: {change}")
        begun = f"resumes at step {step}" if step else "starts at step 0"
        progress.say(
            f"{self.directory.path}: attempt {start.attempt} {begun} of {self.attempt.target}, "
            f"{self.ranks.world_size} rank(s) on {self.ranks.device.type}, {torch.get_num_threads()} thread(s) each"
        )
        if self.config.tracking.enabled:
            self.shipper = ShipperProcess.start(self.directory.path)
        try:
            yield journal, progress
        finally:
            progress.close()
            journal.close()

    def _build(
        self,
        images: Images,
        contract: dict[str, Any],
        checkpoint: Checkpoint | None,
        journal: Journal | None,
        progress: Progress,
    ) -> Loop:
        config, ranks = self.config, self.ranks
        assert self.attempt is not None
        self.trainer = build_trainer(config, ranks, numerics_of(contract), images.shape[0], contract["decay_steps"])
        step = checkpoint.step if checkpoint else 0
        warning = hold_to_contract(contract, self.trainer.canary(images.shape), ranks, config, step)
        if warning:
            progress.say(warning)
        self.trainer.warm_up(images.shape)
        if checkpoint is not None:
            self.trainer.load(checkpoint)
        batches = build_batches(config, ranks, images)
        num_workers = images.num_workers if config.data.num_workers is None else config.data.num_workers
        return Loop(
            trainer=self.trainer,
            batches=iterate(
                batches, self.trainer.step, self.attempt.target, num_workers, pin_memory=ranks.device.type == "cuda"
            ),
            steps_per_epoch=batches.steps_per_epoch,
            contract=contract,
            directory=self.directory,
            attempt=self.attempt,
            journal=journal,
            saver=self.saver,
            shipper=self.shipper,
            progress=progress,
            image_shape=images.shape,
        )

    def end(self, code: ExitCode) -> ExitCode:
        """Rank 0: say on disk and on the terminal how this attempt ended."""
        if self.attempt is None or not self.ranks.is_zero:
            return code
        step = self.trainer.step if self.trainer else (self.attempt.saved_step or 0)
        finished = code == ExitCode.FINISHED
        signal = self.stop.received.name if self.stop.received else "a signal to another rank"
        trouble = self.saver.trouble if self.saver else ""
        reason = "target reached" if finished else f"stopped: {trouble}" if trouble else f"stopped by {signal}"
        if finished:
            try:
                save_curves(read_metrics(self.directory.metrics_file), self.directory.path / "curves.png")
            except Exception as error:  # a picture is no reason to fail a run that is safe on disk
                print(f"warning: curves.png was not drawn ({type(error).__name__}: {error})", flush=True)
        self.attempt.write("finished" if finished else "preempted", step, reason, code)
        self._ended = {"state": "finished" if finished else "preempted", "reason": reason, "exit_code": int(code)}
        print(f"{self.directory.path}: {reason} at step {step}", flush=True)
        if finished:
            self._say_where_things_are(step)
        return code

    def _say_where_things_are(self, step: int) -> None:
        pictures = [self.directory.samples / f"step-{step:08d}.png", self.directory.path / "curves.png"]
        print(f"  pictures  {', '.join(str(path) for path in pictures if path.exists())}")
        print(
            f"  run       {self.directory.path}  (more images: python -m ddpm_dist.sample {self.directory.path})",
            flush=True,
        )

    def fail(self, error: BaseException) -> None:
        """Leave word of an error: status.json on rank 0, the store on others."""
        if self.saver is not None:
            self.saver.settle()  # it would say "running" after us
        code = getattr(error, "exit_code", ExitCode.SOFTWARE)
        reason = " ".join(f"{type(error).__name__}: {error}".split()) if code == ExitCode.SOFTWARE else str(error)
        if not self.ranks.is_zero:
            if not isinstance(error, RankZeroFailed) and not is_lost_contact(error):
                self.ranks.report_failure(int(code), reason)
            return
        failure = Failure(int(code), reason, getattr(error, "ranks", ()))
        if is_lost_contact(error):
            failure = self.ranks.reported_failure() or dataclasses.replace(failure, reason=str(error))
        self._end_failed(failure)

    def _end_failed(self, failure: Failure) -> None:
        self._ended = {"state": "failed", "reason": failure.reason, "exit_code": failure.exit_code}
        nodes = {self.ranks.nodes[rank] for rank in failure.ranks}
        if len(nodes) == 1:  # ranks of several nodes fall silent when one of them has killed the job
            self._ended["failed_node"] = nodes.pop()
        self._write_failed(failure.reason, failure.exit_code)

    def _write_failed(self, reason: str, code: int) -> None:
        """Whoever reads status.json must not find the words of an earlier attempt."""
        attempt = self.attempt or self._attempt_that_did_not_begin()
        if attempt is not None:
            step = self.trainer.step if self.trainer else (attempt.saved_step or 0)
            with contextlib.suppress(OSError, TakenOver):
                attempt.write("failed", step, reason, ExitCode(code))

    def _attempt_that_did_not_begin(self) -> Attempt | None:
        """None while the run may be somebody else's."""
        lease = self.starter.lease
        if lease is None:
            return None
        status = self.directory.read_status()
        saved, target = status.get("saved_step"), status.get("target", 0)
        return Attempt(self.directory, lease.number, target, self.ranks.world_size, saved, lease)

    def _end_wordless(self, reason: str) -> None:
        """From the watchdog: the main thread will not come back."""
        if self.ranks.is_zero:
            silent = self.ranks.watchdog.silent if self.ranks.watchdog else ()
            self._end_failed(self.ranks.reported_failure() or Failure(ExitCode.SOFTWARE, reason, silent))
            self.release()

    def release(self) -> None:
        """Let the next attempt in, and say how this one ended."""
        if self.starter.lease is not None:
            self.starter.lease.release(**self._ended)

    def wait_for_tracking(self, code: ExitCode) -> None:
        """Give the shipper a moment to deliver the end of a finished run. After a stop, time is short."""
        if self.shipper is not None and code == ExitCode.FINISHED:
            self.shipper.wait(timeout_seconds=60)
            print(f"  MLflow    {self.shipper.how_to_look()}", flush=True)


def explain(error: Exception, rank: int) -> tuple[int, str]:
    """(exit code, what to print) for an error that ends this rank."""
    if isinstance(error, RankZeroFailed):
        return error.exit_code, ""
    said = one_line(error)
    if said is not None:
        return said
    if is_lost_contact(error):
        return ExitCode.SOFTWARE, f"error: rank {rank}: {' '.join(str(error).split())}"
    return ExitCode.SOFTWARE, f"rank {rank}:\n{''.join(traceback.format_exception(error))}"

"""The loop around the step: when to log, to draw, to save, to stop."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import ddpm_dist
from ddpm_dist.data.batches import Batch
from ddpm_dist.errors import Diverged, StopRequested
from ddpm_dist.evaluation.pictures import save_grid
from ddpm_dist.evaluation.sampling import sample_blocks
from ddpm_dist.parallel.vote import Wish
from ddpm_dist.run.directory import Attempt, RunDirectory
from ddpm_dist.run.saver import Saver
from ddpm_dist.tracking.journal import Journal
from ddpm_dist.tracking.process import ShipperProcess
from ddpm_dist.training.progress import Progress
from ddpm_dist.training.trainer import Trainer


@dataclass
class Loop:
    """Trains from where the trainer stands to the target; everything on disk goes through rank 0.

    Attributes:
        batches: from the trainer's step on.
        contract: what binds every attempt; into each checkpoint.
        attempt: this life of the run.
        journal: metrics.jsonl; None on other ranks than 0.
        saver: of checkpoints; None on other ranks than 0.
        shipper: of metrics.jsonl to MLflow; None on other ranks than 0, and where nothing is tracked.
        image_shape: (C, H, W).
    """

    trainer: Trainer
    batches: Generator[Batch]
    steps_per_epoch: int
    contract: dict[str, Any]
    directory: RunDirectory
    attempt: Attempt
    journal: Journal | None
    saver: Saver | None
    shipper: ShipperProcess | None
    progress: Progress
    image_shape: tuple[int, int, int]
    _journal_fails: bool = False
    _asked_to_save: bool = False

    def fit(self) -> bool:
        """Train to the target, or until any rank is asked to stop. Collective.

        Returns:
            True if the run is finished, False if it was stopped; its last step is saved either way.
        """
        config, trainer = self.trainer.config, self.trainer
        self._restart_clock()
        try:
            self._preview_if_due()  # the last attempt may have been stopped while it drew
            while trainer.step < self.attempt.target:
                wish = trainer.ranks.agree(self._wish())
                if wish == Wish.STOP:
                    raise StopRequested
                if wish == Wish.SAVE:
                    self._save()
                trainer.train_step(next(self.batches))
                if trainer.step % config.train.log_every == 0 or trainer.step == self.attempt.target:
                    self._log()
                if config.train.check_drift_every and trainer.step % config.train.check_drift_every == 0:
                    self._check_drift()
                if trainer.step == self.attempt.target:
                    self._save_and_wait()
                elif trainer.step % config.checkpoint.every == 0:
                    self._save()
                self._preview_if_due()
        except StopRequested:
            self._save_and_wait()
            return False
        return True

    def _wish(self) -> Wish:
        """What rank 0 asks of all, beside what signals ask."""
        if self.saver is None:
            return Wish.NONE
        if self.saver.gave_up:
            return Wish.STOP
        if self._asked_to_save or not self.saver.wants_save():
            return Wish.NONE
        self._asked_to_save = True  # the answer comes a step later: asking again meanwhile would save twice
        return Wish.SAVE

    def _log(self) -> None:
        trainer, step = self.trainer, self.trainer.step
        lr = trainer.optimizer.param_groups[0]["lr"]
        means = trainer.take_means()
        images = (step - self._clock_step) * trainer.config.data.batch_size
        record = {
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 4),
            "attempt": self.attempt.number,
            "time": time.time(),
            "loss": means.loss,
            "lr": lr,
            "grad_norm": means.grad_norm,
            "skipped": means.skipped,
            "images_per_second": round(images / (time.perf_counter() - self._clock_start), 1),
        }
        self._restart_clock()
        if self.journal is not None:
            self._append(self.journal, record)
            self.progress.update(record)
        if self.shipper is not None:
            self.shipper.revive()
        limit = trainer.config.train.max_skipped
        if means.most_in_a_row >= limit:  # the same on every rank
            trainer.ranks.fail_together(
                Diverged(
                    f"step {step}: the gradients of {means.most_in_a_row} steps in a row were NaN or inf "
                    f"(train.max_skipped={limit}); lower optim.lr or set optim.grad_clip, in another run.name"
                )
            )

    def _restart_clock(self) -> None:
        self._clock_start, self._clock_step = time.perf_counter(), self.trainer.step

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Time spent inside does not count against images per second."""
        before = time.perf_counter()
        yield
        self._clock_start += time.perf_counter() - before

    def _check_drift(self) -> None:
        drifted = self.trainer.drifted_ranks()
        if drifted:  # the same list on every rank
            self.trainer.ranks.fail_together(
                Diverged(
                    f"step {self.trainer.step}: the weights of rank(s) {', '.join(map(str, drifted))} are no longer "
                    "rank 0's: some machine computes wrongly; go on without it, from an older checkpoint"
                )
            )

    def _append(self, journal: Journal, record: dict[str, float]) -> None:
        """A full disk is no reason to stop: the journal keeps the line and writes it later."""
        try:
            journal.append(record)
            self._journal_fails = False
        except OSError as error:
            if not self._journal_fails:
                self.progress.say(f"warning: {self.directory.metrics_file}: {error.strerror}; it is tried again")
            self._journal_fails = True

    def _save(self) -> None:
        """Have a checkpoint of this step written; waits for no more than a copy of the state. Collective.

        While the last one is still being written, rank 0 asks for another step to save at: the others, deep in
        their next collective, must not wait for a slow disk.
        """
        self._asked_to_save = False
        with self._off_the_clock():
            checkpoint = self.trainer.checkpoint(self.contract)
            if self.saver is not None:
                self.saver.submit_unless_busy(checkpoint, self._facts())

    def _save_and_wait(self) -> None:
        """Until a checkpoint of this step is committed: no rank may leave before. Collective."""
        checkpoint, saver = self.trainer.checkpoint(self.contract), self.saver

        def save(should_stop: Callable[[], bool]) -> None:
            assert saver is not None
            if self.attempt.saved_step != checkpoint.step and saver.submitted_step != checkpoint.step:
                saver.submit(checkpoint, self._facts())
            saver.finish()

        self.trainer.ranks.on_rank_zero(save)

    def _facts(self) -> dict[str, Any]:
        """What a manifest says beside size and hash."""
        return {
            "attempt": self.attempt.number,
            "world_size": self.trainer.ranks.world_size,
            "contract": self.contract,
            "versions": {
                "ddpm_dist": ddpm_dist.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }

    def _preview_if_due(self) -> None:
        """Draw a grid from the average's weights on rank 0. Raises StopRequested if that was cut short."""
        trainer, preview = self.trainer, self.trainer.config.preview
        periodic = bool(preview.every and trainer.step and trainer.step % preview.every == 0)
        if not preview.num_images or not (periodic or trainer.step == self.attempt.target):
            return
        path = self.directory.samples / f"step-{trainer.step:08d}.png"

        def draw(should_stop: Callable[[], bool]) -> None:
            if path.exists():
                return

            def on_step() -> None:
                if should_stop():
                    raise StopRequested

            blocks = sample_blocks(
                trainer.ema.model,
                trainer.diffusion,
                shape=self.image_shape,
                num=preview.num_images,
                seed=preview.seed,
                sampler=preview.sampler,
                steps=preview.steps,
                device=trainer.ranks.device,
                on_step=on_step,
            )
            images = torch.cat(list(blocks))
            self.directory.fence()
            try:
                save_grid(images, path)
            except OSError as error:  # a picture is no reason to stop
                self.progress.say(f"warning: {path}: {error.strerror}")

        with self._off_the_clock():
            trainer.ranks.on_rank_zero(draw)

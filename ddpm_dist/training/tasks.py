"""The work that is done between steps, each task at its own period: log, check for drift, save, draw a preview.

To add a task: write a class that is made from a TaskContext and has `due` and `run`, and enter it in TASKS. Tasks run
in the order of that list, on every rank, so that all ranks come to the same collectives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ddpm_dist.build import build_denoiser, build_preview_sampler
from ddpm_dist.config import Config, to_flat, width_of
from ddpm_dist.errors import DataError, Diverged, StopRequested
from ddpm_dist.evaluation.classes import Classes
from ddpm_dist.evaluation.generate import generate_blocks
from ddpm_dist.evaluation.pictures import save_grid
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.training.clock import Clock
from ddpm_dist.training.recorder import Recorder
from ddpm_dist.training.step import Trainer


class Task(Protocol):
    """Work that is done periodically, between steps.

    Attributes:
        repeats_at_start: whether a task that is due at the step where an attempt starts is run before the first
            step. Set it where the attempt before may have been stopped in the middle of the task.
    """

    repeats_at_start: bool

    def due(self, step: int) -> bool:
        """Whether the task is to run after this many finished steps. The answer must be the same on every rank."""

    def run(self) -> None:
        """Do the work. Collective.

        Raises:
            StopRequested: a stop signal cut it short.
        """


@dataclass(frozen=True)
class TaskContext:
    """Everything that a task may use.

    Attributes:
        config: of the run.
        trainer: holds the step, the weights and their averages.
        attempt: knows the target and the run directory.
        recorder: writes and prints on rank 0; does nothing on other ranks.
        clock: a task that takes long pauses it.
        contract: what was decided at step 0; goes into each checkpoint.
        image_shape: (C, H, W).
        steps_per_epoch: number of global batches in one pass over the images.
    """

    config: Config
    trainer: Trainer
    attempt: Attempt
    recorder: Recorder
    clock: Clock
    contract: dict[str, Any]
    image_shape: tuple[int, int, int]
    steps_per_epoch: int


class Log:
    """Writes a line of metrics.jsonl every train.log_every steps and at the target. Stops a run that diverges."""

    repeats_at_start = False

    def __init__(self, context: TaskContext) -> None:
        self._context, self._train = context, context.config.train

    def due(self, step: int) -> bool:
        """Every train.log_every steps, and at the target."""
        return step % self._train.log_every == 0 or step == self._context.attempt.target

    def run(self) -> None:
        """Write the line.

        Raises:
            Diverged: on rank 0, if train.max_skipped updates in a row were left out.
            RankZeroFailed: on the other ranks, in that case.
        """
        context, trainer = self._context, self._context.trainer
        step, means = trainer.step, trainer.statistics.take_means()
        images_per_second = context.clock.steps_per_second(step) * context.config.data.batch_size
        context.recorder.log(
            {
                "step": step,
                "epoch": round(step / context.steps_per_epoch, 4),
                "attempt": context.attempt.number,
                "time": time.time(),
                "loss": means.loss,
                "lr": trainer.update.lr,
                "grad_norm": means.grad_norm,
                "skipped": means.skipped,
                "images_per_second": round(images_per_second, 1),
            }
        )
        if means.most_in_a_row >= self._train.max_skipped:  # the same on every rank
            trainer.ranks.fail_together(
                Diverged(
                    f"step {step}: the gradients of {means.most_in_a_row} steps in a row were NaN or inf "
                    f"(train.max_skipped={self._train.max_skipped}); start another run, under another run.name, with a "
                    "lower optim.lr or with optim.grad_clip"
                )
            )


class CheckDrift:
    """Stops a run whose ranks no longer hold the same weights to the bit, which broken hardware can cause."""

    repeats_at_start = False

    def __init__(self, context: TaskContext) -> None:
        self._every, self._trainer = context.config.train.check_drift_every, context.trainer

    def due(self, step: int) -> bool:
        """Every train.check_drift_every steps; never if that is null."""
        return self._every is not None and step % self._every == 0

    def run(self) -> None:
        """Compare the weights of all ranks.

        Raises:
            Diverged: on rank 0, if some rank's weights differ from rank 0's.
            RankZeroFailed: on the other ranks, in that case.
        """
        trainer = self._trainer
        # The bits of the weights are added as whole numbers: the sum is exact, and one flipped bit changes it.
        bits = [parameter.detach().reshape(-1).view(torch.int32).sum() for parameter in trainer.model.parameters()]
        digests = trainer.ranks.gather(int(torch.stack(bits).sum()))
        drifted = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
        if drifted:  # the same list on every rank
            trainer.ranks.fail_together(
                Diverged(
                    f"step {trainer.step}: the weights of rank(s) {', '.join(drifted)} are no longer rank 0's, so "
                    "some machine computes wrongly; leave that machine out, and go on from an older checkpoint"
                )
            )


class Save:
    """Saves a checkpoint every checkpoint.every steps while training goes on. At the target it waits for the commit."""

    repeats_at_start = False

    def __init__(self, context: TaskContext) -> None:
        self._context, self._config = context, to_flat(context.config)

    def due(self, step: int) -> bool:
        """Every checkpoint.every steps, and at the target."""
        return step % self._context.config.checkpoint.every == 0 or step == self._context.attempt.target

    def run(self) -> None:
        """Save while training goes on, or at the target until the checkpoint is committed."""
        if self._context.trainer.step == self._context.attempt.target:
            self.run_and_wait()
        else:
            self.run_while_training()

    def run_while_training(self) -> None:
        """Have a checkpoint of this step written. Waits only until the state is copied. Collective."""
        with self._context.clock.paused():
            self._context.recorder.save(self._checkpoint())

    def run_and_wait(self) -> None:
        """Write a checkpoint of this step and wait until it is committed; no rank may exit before. Collective.

        Raises:
            OSError, Diverged, TakenOver: on rank 0, as in `Saver.finish`.
            RankZeroFailed: on the other ranks, in that case.
        """
        checkpoint = self._checkpoint()
        self._context.trainer.ranks.on_rank_zero(lambda should_stop: self._context.recorder.save_and_wait(checkpoint))

    def _checkpoint(self) -> Checkpoint:
        return self._context.trainer.checkpoint(self._config, self._context.contract)


class KeepSnapshot:
    """Keeps the power-function averages every checkpoint.ema_snapshots steps. `Save` comes after it, and writes them.

    At the target the checkpoint itself holds them.
    """

    repeats_at_start = False

    def __init__(self, context: TaskContext) -> None:
        self._context, self._every = context, context.config.checkpoint.ema_snapshots
        averages = context.trainer.averages
        self._averages = {name: average for name, average in averages.items() if width_of(name) is not None}

    def due(self, step: int) -> bool:
        """Every checkpoint.ema_snapshots steps; never if that is null."""
        return self._every is not None and step % self._every == 0

    def run(self) -> None:
        """Copy the averages."""
        with self._context.clock.paused():
            self._context.recorder.keep_snapshot(self._context.trainer.step, self._averages)


class Preview:
    """Draws a grid of images on rank 0 from the averaged weights, every preview.every steps and at the target."""

    repeats_at_start = True

    def __init__(self, context: TaskContext) -> None:
        self._context, self._preview = context, context.config.preview
        process = context.trainer.loss.process
        self._sampler, self._options = build_preview_sampler(context.config, process)
        num_classes = context.contract["num_classes"] if context.config.model.class_labels else 0
        self._classes = Classes(num_classes) if num_classes else None
        self._denoiser = build_denoiser(
            context.config,
            context.trainer.averages[self._preview.weights].model,
            num_classes,
            process,
            clip=self._sampler.clips(self._options),
            guidance=self._preview.guidance,
            interval=self._preview.guidance_interval,
            dynamic_threshold=self._preview.dynamic_threshold,
        )

    def due(self, step: int) -> bool:
        """Every preview.every steps, and at the target; never without preview.num_images."""
        periodic = bool(self._preview.every and step and step % self._preview.every == 0)
        return bool(self._preview.num_images) and (periodic or step == self._context.attempt.target)

    def run(self) -> None:
        """Draw the grid, unless an earlier attempt has drawn it. Raises StopRequested if a stop signal came."""
        trainer, attempt = self._context.trainer, self._context.attempt
        path = attempt.directory.samples / f"step-{trainer.step:08d}.png"
        with self._context.clock.paused():
            trainer.ranks.on_rank_zero(lambda should_stop: None if path.exists() else self._draw(path, should_stop))

    def _draw(self, path: Path, should_stop: Callable[[], bool]) -> None:
        def on_step() -> None:
            if should_stop():
                raise StopRequested

        blocks = generate_blocks(
            self._denoiser,
            self._denoiser.process,
            self._sampler,
            shape=self._context.image_shape,
            num=self._preview.num_images,
            seed=self._preview.seed,
            options=self._options,
            device=self._context.trainer.ranks.device,
            on_step=on_step,
            classes=self._classes,
        )
        try:
            images, columns = torch.cat(list(blocks)), None
        except DataError as error:  # the weights may be sound, and the sampler not; training looks at them itself
            self._context.recorder.say(f"warning: step {self._context.trainer.step}: no grid of images: {error}")
            return
        if self._classes is not None:
            images, columns = self._classes.in_rows(images)
        self._context.attempt.check()
        try:
            save_grid(images, path, columns)
            self._context.recorder.say(f"step {self._context.trainer.step}: a grid of images is in {path}")
        except OSError as error:  # a missing picture must not stop the run
            self._context.recorder.say(f"warning: {path}: {error.strerror}")


TASKS: list[Callable[[TaskContext], Task]] = [Log, CheckDrift, KeepSnapshot, Save, Preview]
"""The tasks of every run, in the order in which they run after a step."""

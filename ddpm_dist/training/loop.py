"""The loop around the training step: a step, then the tasks that are due, until the target or a stop signal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ddpm_dist.data.batches import Inputs
from ddpm_dist.errors import StopRequested
from ddpm_dist.parallel.vote import Wish
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.training.recorder import Recorder
from ddpm_dist.training.step import Trainer
from ddpm_dist.training.tasks import Save, Task


@dataclass(frozen=True)
class Loop:
    """Trains from where the trainer stands to the attempt's target.

    Attributes:
        trainer: does one step at a time.
        batches: the micro-batches of this rank, step by step, from the trainer's step on.
        attempt: says the target, and is told the step.
        recorder: what rank 0 writes and says.
        tasks: in the order in which they run after a step.
        save: writes a checkpoint when rank 0 or a stop signal asks for one.
    """

    trainer: Trainer
    batches: Iterator[Sequence[Inputs]]
    attempt: Attempt
    recorder: Recorder
    tasks: Sequence[Task]
    save: Save

    def fit(self) -> bool:
        """Train to the target, or until any rank is asked to stop. Collective.

        Returns:
            True if the run is finished, False if it was stopped; its last step is saved either way.

        Raises:
            Diverged: too many updates in a row were left out, or the ranks hold different weights.
            DataError: an image could not be read.
            OSError: the checkpoint of the last step could not be written.
            RankZeroFailed: on other ranks, for the error that rank 0 reports.
        """
        trainer = self.trainer
        try:
            self._run_tasks([task for task in self.tasks if task.repeats_at_start])
            while trainer.step < self.attempt.target:
                wish = trainer.ranks.agree(self.recorder.wish())
                if wish == Wish.STOP:
                    raise StopRequested
                if wish == Wish.SAVE:
                    self.save.run_while_training()
                trainer.train_step(next(self.batches))
                self.attempt.step = trainer.step
                self._run_tasks(self.tasks)
        except StopRequested:
            self.save.run_and_wait()
            return False
        return True

    def _run_tasks(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if task.due(self.trainer.step):
                task.run()

"""What rank 0 writes and says while it trains. The other ranks have a recorder that does nothing."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any, Protocol

import torch

import ddpm_dist
from ddpm_dist.config import Config, to_yaml
from ddpm_dist.errors import ExitCode
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.vote import Wish
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.run.saver import Saver
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.tracking.journal import Journal
from ddpm_dist.tracking.process import ShipperProcess
from ddpm_dist.training.progress import Progress
from ddpm_dist.training.resume import ResumePoint

DELIVERY_SECONDS = 60.0


class Recorder(Protocol):
    """The files and words of an attempt, as the loop and its tasks see them."""

    def say(self, text: str) -> None:
        """A line for a person."""

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def wish(self) -> Wish:
        """What rank 0 asks of all ranks, beside what signals ask."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Have it written while training goes on."""

    def save_and_wait(self, checkpoint: Checkpoint) -> None:
        """Until it is committed."""


class SilentRecorder:
    """Of all ranks but 0."""

    def say(self, text: str) -> None:
        pass

    def log(self, record: dict[str, Any]) -> None:
        pass

    def wish(self) -> Wish:
        return Wish.NONE

    def save(self, checkpoint: Checkpoint) -> None:
        pass

    def save_and_wait(self, checkpoint: Checkpoint) -> None:
        pass


class RankZeroRecorder:
    """Of rank 0: journal, checkpoints, progress, and the process that mirrors the journal into MLflow.

    Args:
        facts: what each checkpoint's manifest says beside size and hash; plain JSON.
        shippers: the process that ships to MLflow; none where nothing is tracked.
    """

    def __init__(
        self,
        journal: Journal,
        saver: Saver,
        progress: Progress,
        facts: dict[str, Any],
        shippers: list[ShipperProcess],
    ) -> None:
        self._journal, self._saver, self._progress, self._facts = journal, saver, progress, facts
        self._shippers = shippers
        self._journal_fails = self._asked_to_save = False

    def say(self, text: str) -> None:
        self._progress.say(text)

    def log(self, record: dict[str, Any]) -> None:
        """A full disk is no reason to stop: the journal keeps the line and writes it later."""
        try:
            self._journal.append(record)
            self._journal_fails = False
        except OSError as error:
            if not self._journal_fails:
                self.say(f"warning: {error.filename}: {error.strerror}; it is tried again")
            self._journal_fails = True
        self._progress.update(record)
        for shipper in self._shippers:
            shipper.revive()

    def wish(self) -> Wish:
        if self._saver.gave_up:
            return Wish.STOP
        if self._asked_to_save or not self._saver.wants_save():
            return Wish.NONE
        self._asked_to_save = True  # the answer comes a step later: asking again meanwhile would save twice
        return Wish.SAVE

    def save(self, checkpoint: Checkpoint) -> None:
        """While the last one is still being written, `wish` asks for another step to save at.

        The other ranks are in their next collective and must not wait for a slow disk.
        """
        self._asked_to_save = False
        self._saver.submit_unless_busy(checkpoint, self._facts)

    def save_and_wait(self, checkpoint: Checkpoint) -> None:
        self._saver.save_and_wait(checkpoint, self._facts)

    def why_stopped(self) -> str:
        """Why this recorder asked all ranks to stop; empty if it did not."""
        return self._saver.trouble

    def deliver(self, code: ExitCode) -> None:
        """Give MLflow a moment to get the end of a finished run, and say where to look. After a stop, time is short."""
        for shipper in self._shippers if code == ExitCode.FINISHED else []:
            shipper.wait(timeout_seconds=DELIVERY_SECONDS)
            print(f"  MLflow    {shipper.how_to_look()}", flush=True)


@contextlib.contextmanager
def rank_zero_recorder(
    config: Config, ranks: Ranks, attempt: Attempt, store: CheckpointStore, point: ResumePoint, contract: dict[str, Any]
) -> Iterator[RankZeroRecorder]:
    """Open the files, say how this attempt begins, and start the shipper."""
    progress = Progress(True, point.step, attempt.target)
    journal = Journal(attempt.directory.metrics_file, attempt.check)
    saver = Saver(store, config.checkpoint, journal.sync, attempt.committed, progress.say, attempt.saved_step)
    progress.say(to_yaml(config).rstrip())
    for change in point.changed:
        progress.say(f"changed: {change}")
    begun = f"resumes at step {point.step}" if point.step else "starts at step 0"
    progress.say(
        f"{attempt.directory.path}: attempt {attempt.number} {begun} of {attempt.target}, "
        f"{ranks.world_size} rank(s) on {ranks.device.type}, {torch.get_num_threads()} thread(s) each"
    )
    facts = manifest_facts(attempt.number, ranks.world_size, contract)
    shippers = [ShipperProcess.start(attempt.directory.path)] if config.tracking.enabled else []
    try:
        yield RankZeroRecorder(journal, saver, progress, facts, shippers)
    finally:
        saver.settle()  # it says that the run goes on, and is not to say so after us
        progress.close()
        journal.close()


def manifest_facts(attempt: int, world_size: int, contract: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says beside step, size and hash."""
    versions = {
        "ddpm_dist": ddpm_dist.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    return {"attempt": attempt, "world_size": world_size, "contract": contract, "versions": versions}

"""What rank 0 writes and prints while it trains. The other ranks have a recorder that does nothing."""

from __future__ import annotations

import contextlib
import platform
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

import ddpm_dist
from ddpm_dist.config import Config, unlike_the_defaults
from ddpm_dist.errors import ExitCode
from ddpm_dist.models.averages import Average
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.vote import Wish
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.run.saver import Saver
from ddpm_dist.run.snapshots import SnapshotStore
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.tracking.journal import Journal
from ddpm_dist.tracking.process import ShipperProcess
from ddpm_dist.training.progress import Progress
from ddpm_dist.training.resume import ResumePoint

DELIVERY_SECONDS = 60.0


class Recorder(Protocol):
    """What the loop and its tasks use to write and to print."""

    def say(self, text: str) -> None:
        """Print a line for a person."""

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and show its figures."""

    def wish(self) -> Wish:
        """What rank 0 asks of all ranks. Stop signals are not part of it: `Ranks.agree` adds them."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Have the checkpoint written while training goes on."""

    def save_and_wait(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, and return once it is committed."""

    def keep_snapshot(self, step: int, averages: Mapping[str, Average]) -> None:
        """Have the averages of this step written before the next checkpoint is."""


class SilentRecorder:
    """The recorder of every rank except rank 0: it does nothing."""

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

    def keep_snapshot(self, step: int, averages: Mapping[str, Average]) -> None:
        pass


class RankZeroRecorder:
    """The recorder of rank 0. It uses the journal, the saver, the progress display and the shipper.

    Args:
        journal: metrics.jsonl.
        saver: writes checkpoints.
        progress: what a person sees.
        facts: what each checkpoint's manifest says in addition to size and hash; plain JSON.
        shippers: the process that ships the journal to MLflow; empty if tracking is off.
        snapshots: of power-function averages.
    """

    def __init__(
        self,
        journal: Journal,
        saver: Saver,
        progress: Progress,
        facts: dict[str, Any],
        shippers: list[ShipperProcess],
        snapshots: SnapshotStore,
    ) -> None:
        self._journal, self._saver, self._progress, self._facts = journal, saver, progress, facts
        self._shippers, self._snapshots = shippers, snapshots
        self._journal_fails = self._asked_to_save = False

    def say(self, text: str) -> None:
        """Print a line for a person."""
        self._progress.say(text)

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and show its figures.

        A full disk does not stop the run: there is one warning, and the journal keeps the line and writes it later.
        """
        try:
            self._journal.append(record)
            self._journal_fails = False
        except OSError as error:
            if not self._journal_fails:
                self.say(f"warning: {error.filename}: {error.strerror}; its lines are kept and written later")
            self._journal_fails = True
        self._progress.update(record)
        for shipper in self._shippers:
            shipper.revive()

    def wish(self) -> Wish:
        """STOP once checkpoints cannot be saved, SAVE once when a save is due by the clock, else NONE."""
        if self._saver.gave_up:
            return Wish.STOP
        if self._asked_to_save or not self._saver.wants_save():
            return Wish.NONE
        self._asked_to_save = True  # the ranks act on it one step later; to ask again meanwhile would save twice
        return Wish.SAVE

    def save(self, checkpoint: Checkpoint) -> None:
        """Have the checkpoint written while training goes on.

        If the one before is still being written, this one is left out, and `wish` asks for a save at a later step.
        Waiting here would make the other ranks wait in their next collective for a slow disk.
        """
        self._asked_to_save = False
        self._saver.submit_unless_busy(checkpoint, self._facts)

    def save_and_wait(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, and return once it is committed. Raises what `Saver.finish` raises."""
        self._saver.save_and_wait(checkpoint, self._facts)

    def keep_snapshot(self, step: int, averages: Mapping[str, Average]) -> None:
        """Copy the averages of this step; the saver writes them before the next checkpoint."""
        self._snapshots.keep(step, {name: average.state_dict() for name, average in averages.items()})

    def why_stopped(self) -> str:
        """Why this recorder asked all ranks to stop; empty if it did not."""
        return self._saver.trouble

    def deliver(self, code: ExitCode) -> None:
        """Wait up to DELIVERY_SECONDS until MLflow has the end of a finished run, and print where to look at it.

        A run that was stopped does not wait, since its scheduler will end it soon.
        """
        for shipper in self._shippers if code == ExitCode.FINISHED else []:
            shipper.wait(timeout_seconds=DELIVERY_SECONDS)
            print(f"  MLflow    {shipper.how_to_look()}", flush=True)


@contextlib.contextmanager
def rank_zero_recorder(
    config: Config, ranks: Ranks, attempt: Attempt, store: CheckpointStore, point: ResumePoint, contract: dict[str, Any]
) -> Iterator[RankZeroRecorder]:
    """A recorder for rank 0, open inside the `with`. Prints how this attempt starts, and starts the shipper.

    Args:
        store: where checkpoints go.
        point: where this attempt starts.
        contract: what binds every attempt; each checkpoint's manifest repeats it, with what is added to it later.
    """
    progress = Progress(point.step, attempt.target)
    journal = Journal(attempt.directory.metrics_file, attempt.check)
    snapshots = SnapshotStore(attempt.directory.ema_snapshots, attempt.check)

    def before_commit() -> None:
        journal.sync()
        snapshots.flush()

    saver = Saver(store, config.checkpoint, before_commit, attempt.committed, progress.say, attempt.saved_step)
    progress.say(_what_was_chosen(config, attempt))
    for change in point.changed:
        progress.say(f"changed: {change}")
    begun = f"{'resumes' if point.step and point.origin is None else 'starts'} at step {point.step}"
    progress.say(
        f"{attempt.directory.path}: attempt {attempt.number} {begun} of {attempt.target}, "
        f"{ranks.world_size} rank(s) on {ranks.device.type}, {torch.get_num_threads()} thread(s) each"
    )
    facts = manifest_facts(attempt.number, ranks.world_size, contract)
    shippers = [ShipperProcess.start(attempt.directory.path)] if config.tracking.enabled else []
    try:
        yield RankZeroRecorder(journal, saver, progress, facts, shippers, snapshots)
    finally:
        if ranks.watchdog is not None:
            ranks.watchdog.disarm()  # no step follows, and the save that is under way may take longer than a step
        saver.settle()  # a save that ends later would write "running" into status.json over what comes next
        progress.close()
        journal.close()


def _what_was_chosen(config: Config, attempt: Attempt) -> str:
    """The keys whose values are not the defaults, and the file that has all keys, as lines for a person."""
    file, chosen = attempt.directory.config_file, unlike_the_defaults(config)
    if not chosen:
        return f"{file}: every key has its default"
    keys = textwrap.wrap(" ".join(chosen), width=110, break_long_words=False, break_on_hyphens=False)
    return "\n  ".join([f"{file}: every key has its default but for", *keys])


def manifest_facts(attempt: int, world_size: int, contract: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says in addition to step, size and hash, as plain JSON."""
    versions = {
        "ddpm_dist": ddpm_dist.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    return {"attempt": attempt, "world_size": world_size, "contract": contract, "versions": versions}

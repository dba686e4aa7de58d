"""Saving while training goes on: the loop waits only until the state is copied; a thread does the writing."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.config import CheckpointConfig
from ddpm_dist.errors import Diverged, TakenOver
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.store import CheckpointStore

RETRY_SECONDS = 10.0
MAX_FAILURES = 5  # failed saves in a row after which the run stops, since what it learns would be lost


class Saver:
    """Writes the checkpoints of rank 0, one at a time.

    A save that fails (no space, read-only, I/O error) leaves the older checkpoints as they are. The next one is tried
    at a later step: `wants_save` says when. After MAX_FAILURES in a row, `gave_up` asks the run to stop.

    Args:
        store: writes, verifies and prunes the files.
        config: how often to save, and how many checkpoints to keep.
        before_commit: called first, from the writing thread. It makes durable what the checkpoint relies on.
        on_commit: called with the step, from the writing thread, once the checkpoint is committed.
        say: called with a line for a person.
        saved_step: step of the newest checkpoint on disk; None if there is none.

    Attributes:
        trouble: why this saver asks the run to stop; empty if it does not.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        before_commit: Callable[[], None],
        on_commit: Callable[[int], None],
        say: Callable[[str], None],
        saved_step: int | None = None,
    ) -> None:
        self._store, self._config, self._say = store, config, say
        self._before_commit, self._on_commit = before_commit, on_commit
        self.trouble = ""
        self._newest_step = saved_step  # committed, or copied and on its way
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._pending: tuple[Checkpoint, dict[str, Any]] | None = None  # copied, and not committed yet
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures, self._last_time, self._postponed = 0, time.monotonic(), False

    def submit_unless_busy(self, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
        """`submit`, unless a save is under way or has just failed: then `wants_save` asks for one at a later step.

        Args:
            checkpoint: its tensors are copied at once.
            facts: for the checkpoint's manifest, as plain JSON.
        """
        failed_just_now = self._error is not None and time.monotonic() - self._last_time < RETRY_SECONDS
        if self._busy() or failed_just_now:
            self._postponed = True
        else:
            self.submit(checkpoint, facts)

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
        """Copy the state and return; a thread writes it. If a save is still under way, wait for that one first."""
        self.settle()
        copied = {
            item.name: self._copy(getattr(checkpoint, item.name), (item.name,))
            for item in dataclasses.fields(Checkpoint)
        }
        if checkpoint.window.is_cuda or any(value.is_cuda for value in checkpoint.model.values()):
            torch.cuda.synchronize()  # the copies into pinned memory must be complete before training goes on
        self._pending, self._newest_step = (Checkpoint(**copied), facts), checkpoint.step
        self._last_time, self._postponed = time.monotonic(), False
        self._thread = threading.Thread(target=self._write, name="saver")
        self._thread.start()

    def wants_save(self) -> bool:
        """Whether checkpoint.every_seconds have passed, or a save that failed or was postponed is due again."""
        if self._busy():
            return False
        if self._postponed and self._error is None:
            return True
        limit = RETRY_SECONDS if self._error is not None else self._config.every_seconds
        return limit is not None and time.monotonic() - self._last_time >= limit

    @property
    def gave_up(self) -> bool:
        """Whether the run must stop, because checkpoints cannot be saved; `trouble` says why."""
        return self._failures >= MAX_FAILURES or isinstance(self._error, Diverged | TakenOver)

    def save_and_wait(self, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
        """Save this state unless its step is saved already, and wait until it is committed. Raises as `finish` does."""
        if self._newest_step != checkpoint.step:
            self.submit(checkpoint, facts)
        self.finish()

    def finish(self) -> None:
        """Wait until the last submitted state is committed. A save that failed is tried once more.

        Raises:
            OSError: it cannot be written.
            Diverged: the weights are not finite.
            TakenOver: a later attempt has begun.
        """
        self.settle()
        if self._pending is not None:
            self._write()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Wait for a save that is under way, whether it succeeds or fails."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        assert self._pending is not None
        checkpoint, facts = self._pending
        try:
            self._before_commit()
            self._store.save(checkpoint, facts)
            self._store.verify(checkpoint.step)
            self._on_commit(checkpoint.step)
            self._pending, self._error, self._failures = None, None, 0
            self._store.prune(checkpoint.step, self._config.keep_last, self._config.keep_every)
        except Exception as error:  # kept for `finish` and `gave_up`: raised in a thread, it would be lost
            if self._pending is None:
                self._say(f"warning: old checkpoints were not removed ({error})")
                return
            self._error, self._failures = error, self._failures + 1
            self._last_time = time.monotonic()
            self._say(f"warning: the checkpoint of step {checkpoint.step} was not saved ({error})")
            if self.gave_up:
                self.trouble = f"checkpoints could not be saved ({error})"

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        """A deep copy. Its tensors lie in CPU buffers that the next save uses again, found by `path`."""
        if isinstance(value, Tensor):
            buffer = self._buffers.get(path)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                self._buffers[path] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return type(value)((key, self._copy(item, (*path, key))) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, index)) for index, item in enumerate(value))
        return value

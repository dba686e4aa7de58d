"""A thread that says which rank is silent, and ends a process whose main thread is stuck in a collective."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from ddpm_dist.errors import ExitCode

BEAT_SECONDS = 0.5
GRACE_SECONDS = 5.0  # the collective's own time-out, or a checkpoint, comes first
STOP_SECONDS = 10.0  # from a stop signal to the next step boundary, beside three steps


class Watchdog:
    """Counts a heartbeat of this rank up in the store, from a thread of its own.

    The main thread calls `tick` at each step boundary. Once armed, a process that has not ticked for
    timeout_seconds + GRACE_SECONDS leaves; after a stop signal, STOP_SECONDS and three steps are enough.

    Args:
        store: one that no other thread uses, since a store serves one call at a time.
        rank, world_size: of this process.
        timeout_seconds: distributed.timeout_seconds.
        stop_requested: whether this process was asked to stop.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_seconds, self._stop_requested = timeout_seconds, stop_requested
        self._last_tick: float | None = None  # None: not armed
        self._longest_step = 0.0
        self._stop_seen: float | None = None
        self.last_words: Callable[[str], None] = lambda reason: None  # called before the process is ended
        self._leave = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def tick(self) -> None:
        """The main thread is at a step boundary; from here on it is watched."""
        now = time.monotonic()
        if self._last_tick is not None:
            self._longest_step = max(self._longest_step, now - self._last_tick)
        self._last_tick = now

    def disarm(self) -> None:
        """What follows may take as long as it likes."""
        self._last_tick = None

    def close(self) -> None:
        self._leave.set()

    def silent_ranks(self) -> list[int]:
        """Ranks whose heartbeat stands still: dead, stopped or cut off. Takes three beats; empty if nobody can say."""
        try:
            before = self._beats()
            time.sleep(3 * BEAT_SECONDS)
            after = self._beats()
        except RuntimeError:  # the store is gone, and with it the rank or agent that kept it
            return []
        return [rank for rank in range(self._world_size) if before[rank] == after[rank] and rank != self._rank]

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._world_size)]

    def _run(self) -> None:
        while not self._leave.wait(BEAT_SECONDS):
            with contextlib.suppress(RuntimeError):
                self._store.add(f"beat/{self._rank}", 1)
            reason = self._stuck()
            if reason:
                self._end(reason)

    def _stuck(self) -> str:
        if self._stop_requested() and self._stop_seen is None:
            self._stop_seen = time.monotonic()
        last_tick = self._last_tick
        if last_tick is None:
            return ""
        now, limit = time.monotonic(), self._timeout_seconds + GRACE_SECONDS
        if self._stop_seen is not None:
            since = max(last_tick, self._stop_seen)
            limit = min(limit, STOP_SECONDS + 3 * self._longest_step)
            return f"no step ended within {limit:.0f} s of a stop signal" if now - since > limit else ""
        return f"no step ended for {limit:.0f} s" if now - last_tick > limit else ""

    def _end(self, reason: str) -> None:
        silent = self.silent_ranks()
        if silent:
            reason += f"; silent: {name_ranks(silent)}"
        with contextlib.suppress(Exception):
            self.last_words(reason)
        print(f"error: rank {self._rank}: {reason}", file=sys.stderr, flush=True)
        os._exit(ExitCode.SOFTWARE)


def name_ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

"""Says which rank is silent, and ends a process whose main thread is stuck in a collective."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store

from ddpm_dist.errors import ExitCode

BEAT_SECONDS = 0.5
GRACE_SECONDS = 5.0  # beyond the time-out, so that the collective's own error, which says more, comes first
LAST_WORDS_SECONDS = 3.0  # for `last_words`, which may write to a file system that hangs
STORE_SECONDS = 2.0  # a store that has not answered by then is taken for dead
STOP_SECONDS = 10.0  # from a stop signal to the next step boundary, on top of three steps' time


class Watchdog:
    """Two threads: one counts up this rank's heartbeat in the store, the other watches the main thread.

    A call to the store hangs if the process that keeps the store hangs. The thread that watches therefore makes none.

    The main thread calls `tick` at each step boundary. From the second tick on (the first step may compile, which
    takes long), the process is ended with exit code 70 if it has not ticked for timeout_seconds + GRACE_SECONDS.
    After a stop signal it is ended sooner, when STOP_SECONDS and the time of three steps have passed without a tick.

    Args:
        store: one that no other thread uses, since a store serves one call at a time.
        rank, world_size: of this process.
        timeout_seconds: distributed.timeout_seconds.
        stop_requested: whether this process was asked to stop.

    Attributes:
        silent: the ranks that the last `who_is_silent` named.
        last_words: called with the reason, from the watching thread, before the process is ended; set by the owner.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_seconds, self._stop_requested = timeout_seconds, stop_requested
        self._last_tick: float | None = None  # None while the main thread is not watched
        self._ticks = 0
        self._longest_step = 0.0
        self.silent: tuple[int, ...] = ()
        self._stop_seen: float | None = None
        self.last_words: Callable[[str], None] = lambda reason: None
        self._leave = threading.Event()
        for target in (self._beat, self._watch):
            threading.Thread(target=target, daemon=True, name="watchdog").start()

    def tick(self) -> None:
        """The main thread is at a step boundary. From the second one on it is watched."""
        now = time.monotonic()
        if self._last_tick is not None:
            self._longest_step = max(self._longest_step, now - self._last_tick)
        self._last_tick = now if self._ticks else None
        self._ticks += 1

    def arm(self) -> None:
        """Watch the main thread from now on: within the time-out it must call `tick` or `disarm`."""
        self._last_tick = time.monotonic()

    def disarm(self) -> None:
        """Stop watching the main thread: what it does next may take as long as it likes."""
        self._last_tick = None

    def close(self) -> None:
        """End both threads; this rank's heartbeat stops."""
        self._leave.set()

    def who_is_silent(self) -> str:
        """Names the ranks whose heartbeat stands still: dead, stopped or cut off. Takes some seconds.

        Returns:
            "silent: rank 2", or what else can be said.
        """
        silent: list[int] | None = None

        def look() -> None:
            nonlocal silent
            with contextlib.suppress(RuntimeError):
                before = self._beats()
                time.sleep(3 * BEAT_SECONDS)
                after = self._beats()
                silent = [rank for rank, beats in enumerate(before) if after[rank] == beats and rank != self._rank]
            answered.set()

        self.silent = ()
        answered = threading.Event()
        threading.Thread(target=look, daemon=True).start()
        if not answered.wait(3 * BEAT_SECONDS + STORE_SECONDS):
            return "silent: whoever keeps the store (rank 0, or torchrun's first agent)"
        if silent is None:
            return "the store is gone, and with it rank 0 or torchrun's first agent"
        if not silent:
            return "every rank gives signs of life"
        self.silent = tuple(silent)
        return f"silent: rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._world_size)]

    def _beat(self) -> None:
        while not self._leave.wait(BEAT_SECONDS):
            with contextlib.suppress(RuntimeError):
                self._store.add(f"beat/{self._rank}", 1)

    def _watch(self) -> None:
        while not self._leave.wait(BEAT_SECONDS):
            reason = self._stuck()
            if reason:
                self._end(reason)

    def _stuck(self) -> str:
        """Why this process is to be ended, or ""."""
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
        reason += f"; {self.who_is_silent()}"
        # They come from a thread, because this process must end even if they hang with the file system.
        words = threading.Thread(target=self.last_words, args=(reason,), daemon=True)
        words.start()
        words.join(LAST_WORDS_SECONDS)
        print(f"error: rank {self._rank}: {reason}", file=sys.stderr, flush=True)
        os._exit(ExitCode.SOFTWARE)

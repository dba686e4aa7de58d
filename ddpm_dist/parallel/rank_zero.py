"""Work that rank 0 does alone while the others wait, and work of all ranks at their own speeds.

All of it goes through the store and not through collectives, which would time out during long work. Rank 0 counts up a
heartbeat while it works, and leaves the outcome under a key that the others look for.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from ddpm_dist.errors import ExitCode, StopRequested, UserError
from ddpm_dist.parallel.connection import POLL_SECONDS, Connection
from ddpm_dist.parallel.failures import RankLost, RankZeroFailed, user_error

T = TypeVar("T")
BEAT_SECONDS = 1.0  # between two heartbeats of rank 0 while it works


class RankZeroWork:
    """How connected ranks do `on_rank_zero`, `all_succeed` and `in_shares` of `Ranks`, where these are described.

    Args:
        connection: to the other ranks.
        stop_requested: whether this process was asked to stop.

    Attributes:
        failure_is_shared: whether every rank has learned that the work failed.
    """

    def __init__(self, connection: Connection, stop_requested: Callable[[], bool]) -> None:
        self._connection, self._store = connection, connection.store
        self._stop_requested = stop_requested
        self._count = 0  # the same on every rank; it tells the keys of one piece of work from those of the next
        self.failure_is_shared = False

    def do(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        """Rank 0 does the work; every rank returns what it returned. Collective."""
        self._connection.watchdog.disarm()
        self._count += 1
        name = f"solo/{self._count}"
        return self._work(name, work) if self._connection.rank == 0 else self._wait(name)

    def _work(self, name: str, work: Callable[[Callable[[], bool]], Any]) -> Any:
        outcome: dict[str, Any] = {"failed": ExitCode.SOFTWARE}
        try:
            with self._beating(name) as should_stop:
                value = work(should_stop)
            outcome = {"value": value}
        except StopRequested:
            outcome = {"stopped": True}
            raise
        except UserError as error:
            outcome = {"failed": error.exit_code}
            raise
        except RankLost:
            outcome["lost"] = True
            raise
        finally:
            self._learn(outcome)
            self._store.set(f"{name}/outcome", json.dumps(outcome))
        return value

    def _learn(self, outcome: dict[str, Any]) -> None:
        """Note whether all ranks know of a failure, so that they can wait for each other before they exit.

        If a rank was lost they cannot: they would wait in vain for the lost one.
        """
        self.failure_is_shared = "failed" in outcome and "lost" not in outcome

    @contextlib.contextmanager
    def _beating(self, name: str) -> Iterator[Callable[[], bool]]:
        """Count up a heartbeat in the store until left; yields whether any rank was asked to stop."""
        leave, stop_elsewhere = threading.Event(), threading.Event()

        def beat() -> None:
            while not leave.wait(BEAT_SECONDS):
                self._store.add(f"{name}/beat", 1)
                if self._store.check([f"{name}/stop"]):
                    stop_elsewhere.set()

        thread = threading.Thread(target=beat, daemon=True, name="beat")
        thread.start()
        try:
            yield lambda: self._stop_requested() or stop_elsewhere.is_set()
        finally:
            leave.set()
            thread.join()

    def _wait(self, name: str) -> Any:
        """On the other ranks: wait for the outcome, and tell rank 0 of a stop signal that came here."""
        pulse = Pulse(self._store, f"{name}/beat", 0, self._connection.timeout_seconds)
        told, next_look = False, time.monotonic()
        while not self._store.check([f"{name}/outcome"]):
            if self._stop_requested() and not told:
                self._store.set(f"{name}/stop", "1")
                told = True
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + BEAT_SECONDS
                pulse.check()
            time.sleep(POLL_SECONDS)
        outcome = json.loads(self._store.get(f"{name}/outcome"))
        if "stopped" in outcome:
            raise StopRequested
        self._learn(outcome)
        if "failed" in outcome:
            raise RankZeroFailed(outcome["failed"])
        return outcome["value"]

    def all_succeed(self, work: Callable[[], T]) -> T:
        """Every rank does the work and rank 0 collects how it went; returns this rank's value. Collective."""
        name = f"each/{self._count}"
        values: list[T] = []

        def work_and_collect(should_stop: Callable[[], bool]) -> None:
            values.append(work())
            self._collect(name, should_stop)

        if self._connection.rank:
            values += self._work_and_tell(f"{name}/{self._connection.rank}", work)
        self.do(work_and_collect)
        return values[0]

    def in_shares(self, work: Callable[[Callable[[], bool]], None]) -> None:
        """Every rank does its share at its own speed; if one stops or fails, all of them stop. Collective."""
        name = f"shares/{self._count}"
        halt = Halt(self._store, f"{name}/halt")

        def share(should_stop: Callable[[], bool]) -> None:
            try:
                work(lambda: should_stop() or halt.is_called())
            except StopRequested:
                halt.call()
            except BaseException:
                halt.call()
                raise

        def share_and_collect(should_stop: Callable[[], bool]) -> None:
            try:
                share(should_stop)
                self._collect(name, should_stop)
            except StopRequested:
                halt.call()
                raise
            if halt.was_called():  # nobody has failed, so some rank was asked to stop
                raise StopRequested

        if not self._connection.rank:
            self.do(share_and_collect)
            return
        try:
            self._work_and_tell(f"{name}/{self._connection.rank}", lambda: share(self._stop_requested))
        except Exception:
            with contextlib.suppress(RankZeroFailed):
                self.do(share_and_collect)  # so that all ranks know, and leave together
            raise
        self.do(share_and_collect)

    def _collect(self, name: str, should_stop: Callable[[], bool]) -> None:
        """On rank 0: wait for the outcome of every other rank, and raise the first error that one of them met."""
        for rank in range(1, self._connection.world_size):
            outcome = json.loads(self._await_from(rank, f"{name}/{rank}", should_stop))
            if outcome["failed"]:
                raise user_error(outcome["failed"], outcome["message"], rank)

    def _work_and_tell(self, key: str, work: Callable[[], T]) -> list[T]:
        """Do the work and leave its outcome for rank 0, which raises what the user can mend; that gives no value."""
        rank = self._connection.rank
        try:
            value = work()
        except UserError as error:
            self._tell(key, error.exit_code, f"{error} (seen by rank {rank})")
            return []
        except Exception as error:
            self._tell(key, ExitCode.SOFTWARE, f"rank {rank}: {type(error).__name__}: {error}")
            raise
        self._tell(key, 0, "")
        return [value]

    def _tell(self, key: str, failed: int, message: str) -> None:
        self._store.set(key, json.dumps({"failed": failed, "message": message}))

    def _await_from(self, rank: int, key: str, should_stop: Callable[[], bool]) -> bytes:
        """A key that another rank will set, waited for as long as that rank's watchdog counts its heartbeat."""
        pulse = Pulse(self._connection.heartbeats, f"beat/{rank}", rank, self._connection.timeout_seconds)
        while not self._store.check([key]):
            if should_stop():
                raise StopRequested
            pulse.check()
            time.sleep(POLL_SECONDS)
        return self._store.get(key)


class Pulse:
    """Tells that another rank has fallen silent: the heartbeat that it counts up in the store stands still.

    Args:
        store, key: where it counts.
        rank: which rank that is.
        timeout_seconds: how long it may stand still.
    """

    def __init__(self, store: Store, key: str, rank: int, timeout_seconds: float) -> None:
        self._store, self._key, self._rank, self._timeout_seconds = store, key, rank, timeout_seconds
        self._last_beat, self._last_change = -1, time.monotonic()

    def check(self) -> None:
        """Look at the counter.

        Raises:
            RankLost: it has not moved for longer than the time-out, as far as these looks have seen.
        """
        now, beat = time.monotonic(), self._store.add(self._key, 0)
        if beat != self._last_beat:
            self._last_beat, self._last_change = beat, now
        elif now - self._last_change > self._timeout_seconds:
            raise RankLost(f"rank {self._rank} has been silent for {self._timeout_seconds:g} s", [self._rank])


class Halt:
    """A key of the store by which one rank tells all that they shall stop what they are doing.

    Args:
        store, key: where the word is left.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._called, self._next_look = False, time.monotonic()

    def call(self) -> None:
        """Tell all ranks to stop."""
        self._called = True
        self._store.set(self._key, "1")

    def is_called(self) -> bool:
        """Whether a rank has told all to stop, as of BEAT_SECONDS ago at most. It costs next to nothing."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + BEAT_SECONDS
            return self.was_called()
        return self._called

    def was_called(self) -> bool:
        """Whether a rank has told all to stop, as of now."""
        self._called = self._called or self._store.check([self._key])
        return self._called

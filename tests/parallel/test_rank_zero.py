"""Work of rank 0 alone, and work that all must succeed at: with real ranks, and with threads as ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from rank_processes import connect, run_ranks
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from ddpm_dist.errors import ConfigError, DataError, StopRequested
from ddpm_dist.parallel import watchdog
from ddpm_dist.parallel.connection import Connection
from ddpm_dist.parallel.failures import RankLost, RankZeroFailed
from ddpm_dist.parallel.rank_zero import Pulse, RankZeroWork
from ddpm_dist.parallel.watchdog import Watchdog

# Real ranks


def slow_rank_zero() -> int:
    ranks, _ = connect(timeout_seconds=2.0)

    def work(should_stop: Callable[[], bool]) -> str:
        time.sleep(5)  # far beyond the time-out of any collective
        return "drawn"

    assert ranks.on_rank_zero(work) == "drawn"
    ranks.leave()
    return 0


@pytest.mark.slow
def test_work_of_rank_zero_may_take_longer_than_any_timeout(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 3, slow_rank_zero) == [0, 0, 0]


def silent_rank_zero() -> int:
    ranks, _ = connect(timeout_seconds=2.0)
    if ranks.is_zero:
        time.sleep(8)  # hangs, and does not even beat
        return 0
    try:
        ranks.on_rank_zero(lambda should_stop: None)
    except RankLost:
        return 7
    return 1


@pytest.mark.slow
def test_rank_zero_that_hangs_is_noticed_within_the_timeout(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, silent_rank_zero) == [0, 7]


def failing_rank_zero() -> int:
    ranks, _ = connect()

    def work(should_stop: Callable[[], bool]) -> None:
        raise DataError("no images")

    try:
        ranks.on_rank_zero(work)
    except DataError:
        assert ranks.is_zero
        code = 65
    except RankZeroFailed as error:
        code = error.exit_code
    assert ranks.failure_is_shared
    ranks.leave()
    return code


def test_failure_of_rank_zero_ends_all_ranks_with_its_exit_code(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, failing_rank_zero) == [65, 65]


def one_rank_lacks_data() -> int:
    ranks, _ = connect()

    def work() -> int:
        if ranks.rank == 1:
            raise DataError("missing on this node")
        return ranks.rank

    try:
        ranks.all_succeed(work)
    except DataError as error:
        code = 65 if ranks.is_zero and "rank 1" in str(error) else 1
    except RankZeroFailed as error:
        code = error.exit_code
    ranks.leave()
    return code


def test_failure_of_any_rank_is_told_by_rank_zero(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 3, one_rank_lacks_data) == [65, 65, 65]


def signal_while_rank_zero_works() -> int:
    ranks, _ = connect()

    def work(should_stop: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if should_stop():
                raise StopRequested
            time.sleep(0.05)

    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    try:
        ranks.on_rank_zero(work)
    except StopRequested:
        ranks.leave()
        return 75
    return 1


def test_signal_to_a_waiting_rank_stops_the_work_of_rank_zero(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, signal_while_rank_zero_works) == [75, 75]


# Threads as ranks, with a store in memory


def never() -> bool:
    return False


def connection(store: Store, rank: int, world_size: int, timeout_seconds: float = 20.0) -> Connection:
    """What rank_zero.py uses of a connection; no process group is made."""
    return Connection(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        timeout_seconds=timeout_seconds,
        group_timeout=timedelta(seconds=timeout_seconds),
        nodes=[],
        watchdog=Watchdog(PrefixStore("watchdog", store), rank, world_size, timeout_seconds, never),
        store=PrefixStore("ddpm_dist", store),
        heartbeats=PrefixStore("watchdog", store),
        flags=cast(dist.ProcessGroup, None),
    )


def on_threads(world_size: int, function: Callable[[RankZeroWork, int], Any]) -> tuple[list[Any], list[RankZeroWork]]:
    """What the function returned, or the exception that it raised, by rank; and the ranks' work rooms."""
    store = HashStore()
    connections = [connection(store, rank, world_size) for rank in range(world_size)]
    rooms = [RankZeroWork(each, never) for each in connections]
    outcomes: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = function(rooms[rank], rank)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for each in connections:
        each.watchdog.close()
    return outcomes, rooms


def test_every_rank_has_what_rank_zero_returned_and_one_piece_of_work_is_not_taken_for_the_next() -> None:
    workers = []

    def function(room: RankZeroWork, rank: int) -> list[Any]:
        def work(number: int) -> dict[str, Any]:
            workers.append(rank)
            return {"number": number, "none": None}

        return [room.do(lambda should_stop, number=number: work(number)) for number in range(3)]  # type: ignore[misc]

    outcomes, _ = on_threads(3, function)
    assert outcomes == [[{"number": number, "none": None} for number in range(3)]] * 3
    assert workers == [0, 0, 0]


@pytest.mark.parametrize(
    ("error", "exit_code", "shared"),
    [
        (DataError("no images"), 65, True),
        (ConfigError("no such key"), 78, True),
        (ZeroDivisionError(), 70, True),
        (RankLost("rank 2 has been silent", [2]), 70, False),  # no use waiting for rank 2 before the others leave
    ],
)
def test_rank_zero_raises_its_error_and_the_others_end_with_its_code(
    error: Exception, exit_code: int, shared: bool
) -> None:
    def fail(should_stop: Callable[[], bool]) -> None:
        raise error

    outcomes, rooms = on_threads(3, lambda room, rank: room.do(fail))
    assert outcomes[0] is error
    for outcome in outcomes[1:]:
        assert isinstance(outcome, RankZeroFailed)
        assert outcome.exit_code == exit_code
    assert [room.failure_is_shared for room in rooms] == [shared] * 3


def test_work_that_was_cut_short_is_no_failure() -> None:
    def stop(should_stop: Callable[[], bool]) -> None:
        raise StopRequested

    outcomes, rooms = on_threads(2, lambda room, rank: room.do(stop))
    assert [type(outcome) for outcome in outcomes] == [StopRequested] * 2
    assert [room.failure_is_shared for room in rooms] == [False] * 2


class Toothless(Watchdog):
    """A watchdog that notes why it would have ended the process."""

    def _end(self, reason: str) -> None:
        self.silent = (self._rank,)


def test_no_watchdog_is_armed_while_rank_zero_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.05)
    store = HashStore()
    dog = Toothless(PrefixStore("watchdog", store), 0, 1, 0.3, never)
    room = RankZeroWork(dataclasses.replace(connection(store, 0, 1), watchdog=dog), never)
    dog.arm()
    room.do(lambda should_stop: time.sleep(1))
    assert list(dog.silent) == []
    dog.arm()
    time.sleep(1)
    assert dog.silent == (0,), "it would have bitten"
    dog.close()


def test_each_rank_keeps_what_its_own_work_returned() -> None:
    def function(room: RankZeroWork, rank: int) -> list[Any]:
        return [
            room.all_succeed(lambda: rank),
            room.do(lambda should_stop: "in between"),
            room.all_succeed(lambda: -rank),
        ]

    outcomes, _ = on_threads(3, function)
    assert outcomes == [[rank, "in between", -rank] for rank in range(3)]


def test_a_mistake_of_the_user_on_one_rank_is_raised_by_rank_zero_which_says_whose_it_is() -> None:
    def function(room: RankZeroWork, rank: int) -> Any:
        def work() -> None:
            if rank == 1:
                raise DataError("missing here")

        return room.all_succeed(work)

    outcomes, rooms = on_threads(3, function)
    assert isinstance(outcomes[0], DataError)
    assert (str(outcomes[0]), outcomes[0].ranks) == ("missing here (seen by rank 1)", (1,))
    assert [outcome.exit_code for outcome in outcomes[1:]] == [65, 65]
    assert [room.failure_is_shared for room in rooms] == [True] * 3


def test_an_error_of_ours_on_one_rank_is_raised_there_and_ends_all() -> None:
    def function(room: RankZeroWork, rank: int) -> Any:
        return room.all_succeed(lambda: 1 / (rank - 2))

    outcomes, _ = on_threads(3, function)
    assert "rank 2: ZeroDivisionError" in str(outcomes[0])
    assert outcomes[0].exit_code == 70
    assert isinstance(outcomes[1], RankZeroFailed)
    assert isinstance(outcomes[2], ZeroDivisionError), "its own traceback is the one that helps"


def test_a_rank_without_a_heartbeat_is_lost_once_the_time_is_up() -> None:
    store = HashStore()
    alone = connection(store, 0, 2, timeout_seconds=0.5)
    room = RankZeroWork(alone, never)
    begun = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 has been silent for 0\.5 s") as raised:
        room.all_succeed(lambda: None)
    alone.watchdog.close()
    assert raised.value.ranks == (1,)
    assert time.monotonic() - begun >= 0.5
    outcome = json.loads(alone.store.get("solo/1/outcome"))
    assert outcome == {"failed": 70, "lost": True}
    assert not room.failure_is_shared


def test_a_pulse_that_goes_on_is_no_silence() -> None:
    store = HashStore()
    pulse = Pulse(store, "beat", 3, timeout_seconds=0.2)
    for _ in range(4):
        time.sleep(0.15)
        store.add("beat", 1)
        pulse.check()
    time.sleep(0.3)
    with pytest.raises(RankLost) as raised:
        pulse.check()
    assert raised.value.ranks == (3,)

"""The watchdog ends a process that hangs, leaves alone one that is slow where it may be, and names the silent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_processes import run_ranks
from torch._C._distributed_c10d import HashStore, Store

from ddpm_dist.parallel import watchdog as module
from ddpm_dist.parallel.watchdog import Watchdog


def never() -> bool:
    return False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(module, "STORE_SECONDS", 1.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_ranks_whose_heartbeat_stands_still_are_named() -> None:
    store = HashStore()
    dogs = [Watchdog(store, rank, 4, 60.0, never) for rank in (0, 1)]
    assert list(dogs[0].silent) == []
    assert dogs[0].who_is_silent() == "silent: ranks 2, 3"
    assert dogs[0].silent == (2, 3)
    dogs.append(Watchdog(store, 2, 4, 60.0, never))
    assert dogs[0].who_is_silent() == "silent: rank 3"
    dogs.append(Watchdog(store, 3, 4, 60.0, never))
    assert dogs[0].who_is_silent() == "every rank gives signs of life"
    assert list(dogs[0].silent) == []
    dogs[1].close()
    time.sleep(0.6)
    assert dogs[0].who_is_silent() == "silent: rank 1"
    for dog in dogs:
        dog.close()


class BrokenStore:
    """A store whose process is dead, or hangs with every question."""

    def __init__(self, answer: Callable[[], int]) -> None:
        self._answer = answer

    def add(self, key: str, amount: int) -> int:
        return self._answer()


def hang() -> int:
    time.sleep(15)
    return 0


def die() -> int:
    raise RuntimeError("Connection reset by peer")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("answer", "said"), [(hang, "whoever keeps the store"), (die, "the store is gone")])
def test_a_store_that_does_not_answer_is_what_is_said(answer: Callable[[], int], said: str) -> None:
    store: Store = BrokenStore(answer)  # type: ignore[assignment]
    dog = Watchdog(store, 1, 2, 60.0, never)
    begun = time.monotonic()
    assert said in dog.who_is_silent()
    assert time.monotonic() - begun < 10
    dog.close()


def watched(use: Callable[[Watchdog], None]) -> int:
    """In a process of its own, which the watchdog may end: it is stuck after 1.5 s."""
    module.BEAT_SECONDS, module.GRACE_SECONDS = 0.05, 0.5
    dog = Watchdog(HashStore(), 0, 2, 1.0, never)
    dog.last_words = lambda reason: print(f"last words: {reason}", flush=True)
    use(dog)
    return 0


def hang_while_armed(dog: Watchdog) -> None:
    dog.arm()
    time.sleep(30)


def hang_in_the_second_step(dog: Watchdog) -> None:
    dog.tick()
    dog.tick()
    time.sleep(30)


def take_long_where_that_is_allowed(dog: Watchdog) -> None:
    dog.tick()
    time.sleep(2)  # the first step compiles
    dog.tick()
    for _ in range(10):
        time.sleep(0.2)
        dog.tick()
    dog.disarm()
    time.sleep(2)
    dog.arm()
    dog.close()
    time.sleep(2)


def hang_and_last_words_hang_too(dog: Watchdog) -> None:
    module.LAST_WORDS_SECONDS = 0.2
    dog.last_words = lambda reason: time.sleep(60)
    hang_while_armed(dog)


def armed() -> int:
    return watched(hang_while_armed)


def stepping() -> int:
    return watched(hang_in_the_second_step)


def speechless() -> int:
    return watched(hang_and_last_words_hang_too)


def patient() -> int:
    return watched(take_long_where_that_is_allowed)


def stopped() -> int:
    """The time-out alone would leave it half a minute."""
    begun = time.monotonic()
    module.BEAT_SECONDS, module.STOP_SECONDS = 0.05, 0.2
    dog = Watchdog(HashStore(), 0, 2, 30.0, lambda: time.monotonic() - begun > 0.5)
    hang_while_armed(dog)
    return os.EX_OK


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (armed, "no step ended for 2 s; silent: rank 1"),
        (stepping, "no step ended for 2 s; silent: rank 1"),
        (speechless, "no step ended for 2 s; silent: rank 1"),
        (stopped, "of a stop signal; silent: rank 1"),
    ],
)
@pytest.mark.slow
def test_a_process_that_hangs_is_ended_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], function: Callable[[], int], said: str
) -> None:
    assert run_ranks(tmp_path, 1, function) == [70], "left alone it would end with 0, half a minute later"
    output = capsys.readouterr().out
    assert "error: rank 0: no step ended" in output
    assert said in output
    assert ("last words: no step ended" in output) == (function in (armed, stepping))


@pytest.mark.slow
def test_a_process_that_may_take_long_is_left_alone(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 1, patient) == [0]

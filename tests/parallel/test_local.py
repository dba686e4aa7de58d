"""Ranks on this machine: they have torchrun's variables, end as they are told, and none is left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from harness import Job


def say_who_i_am(words: Sequence[str]) -> int:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    print(*words, *(os.environ[name] for name in names), flush=True)
    return 10 + int(os.environ["RANK"])


def sleep_long() -> int:
    print("asleep", flush=True)
    time.sleep(300)
    return 0


def fail() -> int:
    raise ZeroDivisionError("on purpose")


def test_each_rank_has_the_variables_of_torchrun_and_an_exit_code_of_its_own(tmp_path: Path) -> None:
    with Job(2, tmp_path / "log", say_who_i_am, (["hello"],)) as ranks:
        assert ranks.exit_codes(60) == [10, 11]
        assert sorted(ranks.output().splitlines()) == ["hello 0 0 2 2 127.0.0.1", "hello 1 1 2 2 127.0.0.1"]
        assert not ranks.alive()


def test_killed_ranks_say_so_and_none_is_left_behind(tmp_path: Path) -> None:
    with Job(2, tmp_path / "log", sleep_long, ()) as ranks:
        deadline = time.monotonic() + 60
        while ranks.output().count("asleep") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks.kill(1)
        assert ranks.exit_codes(0.1) == [None, -9]
        assert ranks.alive()
    assert ranks.exit_codes(0.1) == [-9, -9]


def test_an_exception_is_in_the_log_and_ends_with_one(tmp_path: Path) -> None:
    with Job(1, tmp_path / "log", fail, ()) as ranks:
        assert ranks.exit_codes(60) == [1]
        assert "ZeroDivisionError: on purpose" in ranks.output()

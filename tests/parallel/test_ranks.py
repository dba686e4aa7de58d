"""What ranks agree on: who works alone, who has failed, when to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Job

from ddpm_dist.errors import ConfigError, DataError, StopRequested
from ddpm_dist.parallel.environment import read_environment
from ddpm_dist.parallel.failures import RankLost, RankZeroFailed
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.vote import Wish
from ddpm_dist.run.preemption import StopSignal


def connect(timeout_seconds: float = 30.0) -> tuple[Ranks, StopSignal]:
    import torch

    torch.set_num_threads(1)
    stop = StopSignal().install(under_launcher=False)
    return Ranks(read_environment(), torch.device("cpu"), timeout_seconds, stop.requested), stop


def run_ranks(tmp_path: Path, world_size: int, function: Callable[[], int]) -> list[int | None]:
    with Job(world_size, tmp_path / "ranks.log", function, ()) as job:
        codes = job.wait(60)
        print(job.output())
        return codes


def slow_rank_zero() -> int:
    ranks, _ = connect(timeout_seconds=2.0)

    def work(should_stop: Callable[[], bool]) -> str:
        time.sleep(5)  # far beyond the time-out of any collective
        return "drawn"

    assert ranks.on_rank_zero(work) == "drawn"
    ranks.leave()
    return 0


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


def stop_in_the_same_step() -> int:
    ranks, _ = connect()
    for step in range(1000):
        if ranks.agree() == Wish.STOP:
            ranks.leave()
            return step
        if step == 5 and ranks.rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001 * ranks.rank)
    return 255


def test_all_ranks_stop_in_the_same_step(tmp_path: Path) -> None:
    codes = run_ranks(tmp_path, 3, stop_in_the_same_step)
    assert len(set(codes)) == 1, codes
    assert codes[0] in (6, 7)


def leave_at_different_times() -> int:
    ranks, _ = connect()
    time.sleep(0.5 * ranks.rank)
    begin = time.monotonic()
    ranks.leave()
    return 0 if ranks.rank == 2 or time.monotonic() - begin > 0.3 else 1


def test_no_rank_leaves_under_another(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 3, leave_at_different_times) == [0, 0, 0]


def test_more_ranks_than_gpus_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ddpm_dist.parallel.connection import pick_device
    from ddpm_dist.parallel.environment import RankEnvironment

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 ranks on a node with 2 GPUs"):
        pick_device("auto", RankEnvironment(3, 3, 4, 4, "torchrun"))
    assert pick_device("auto", RankEnvironment(1, 1, 2, 2, "torchrun")) == torch.device("cuda", 1)
    assert pick_device("cpu", RankEnvironment(3, 3, 4, 4, "torchrun")) == torch.device("cpu")

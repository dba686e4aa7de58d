"""What ranks do together, and that a single process does the same without any process group."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_processes import connect, run_ranks
from torch import nn

from ddpm_dist.errors import DataError, Diverged, StopRequested
from ddpm_dist.parallel.environment import RankEnvironment, node_name
from ddpm_dist.parallel.failures import Failure, RankZeroFailed
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.vote import Wish

# Several ranks


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


def add_up() -> int:
    ranks, _ = connect()
    values = torch.tensor([1.0, ranks.rank])
    assert ranks.sum(values) is values
    assert values.tolist() == [4.0, 6.0]
    large = 2**53 + 1  # a float64 would not hold it
    assert ranks.gather(large + ranks.rank) == [large + rank for rank in range(4)]
    for bit, group in enumerate(ranks.partners_by_bit()):
        mine = torch.tensor([float(ranks.rank)])
        dist.all_reduce(mine, group=group)
        assert mine.item() == ranks.rank + (ranks.rank ^ 1 << bit), bit
    module = ranks.wrap(nn.Linear(1, 1, bias=False))
    module(torch.tensor([[float(ranks.rank)]])).sum().backward()
    (weight,) = module.parameters()
    assert weight.grad is not None
    assert weight.grad.item() == 1.5, "the mean of 0, 1, 2 and 3"
    ranks.leave()
    return 0


def test_ranks_add_up_gather_and_average_gradients(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 4, add_up) == [0, 0, 0, 0]


def find_the_same_error() -> int:
    ranks, _ = connect()
    assert not ranks.failure_is_shared
    try:
        ranks.fail_together(Diverged("NaN"))
    except Diverged:
        code = 76 if ranks.is_zero else 1
    except RankZeroFailed as error:
        code = 1 if ranks.is_zero else error.exit_code
    assert ranks.failure_is_shared
    ranks.leave()
    return code


def test_an_error_that_all_have_found_is_raised_by_rank_zero_alone(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 3, find_the_same_error) == [76, 76, 76]


def end_alone() -> int:
    ranks, _ = connect()
    ranks.all_succeed(lambda: None)
    if ranks.rank == 1:
        ranks.report_failure(65, "no images")
        os._exit(7)
    deadline = time.monotonic() + 20
    while ranks.reported_failure() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ranks.reported_failure() == Failure(65, "rank 1: no images", (1,))
    error = ranks.lost(RuntimeError("gloo:\n  closed"))
    assert "lost contact to another rank (gloo: closed); silent: rank 1" in str(error)
    assert error.ranks == (1,)
    os._exit(0)


def test_rank_zero_learns_why_another_rank_has_ended_and_which_one_is_silent(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, end_alone) == [0, 7]


# One process


class Asked:
    """Whether this process was asked to stop, as a test decides it."""

    def __init__(self) -> None:
        self.to_stop = False

    def __call__(self) -> bool:
        return self.to_stop


def one_process(asked: Asked | None = None) -> Ranks:
    return Ranks(RankEnvironment(0, 0, 1, 1, "none"), torch.device("cpu"), 30.0, asked or Asked())


def test_one_process_is_all_ranks_and_makes_no_process_group() -> None:
    ranks, module, values = one_process(), nn.Linear(1, 1), torch.tensor([3.0])
    assert (ranks.rank, ranks.world_size, ranks.is_zero, ranks.nodes) == (0, 1, True, [node_name()])
    assert ranks.watchdog is None
    assert ranks.wrap(module) is module
    assert ranks.sum(values) is values
    assert values.tolist() == [3.0]
    assert ranks.gather(5) == [5]
    assert ranks.partners_by_bit() == []
    assert ranks.on_rank_zero(lambda should_stop: {"a": (1, should_stop())}) == {"a": (1, False)}
    assert ranks.all_succeed(lambda: "mine") == "mine"
    ranks.report_failure(65, "nobody reads this")
    assert ranks.reported_failure() is None
    ranks.leave()
    assert not dist.is_initialized()


def test_one_process_is_answered_at_once() -> None:
    asked = Asked()
    ranks = one_process(asked)
    assert [ranks.agree(wish) for wish in (Wish.NONE, Wish.SAVE, Wish.STOP)] == [Wish.NONE, Wish.SAVE, Wish.STOP]
    asked.to_stop = True
    assert ranks.agree() == ranks.agree(Wish.SAVE) == Wish.STOP
    assert ranks.on_rank_zero(lambda should_stop: should_stop()) is True


@pytest.mark.parametrize("error", [DataError("no images"), StopRequested(), ZeroDivisionError()])
def test_one_process_raises_its_own_errors(error: Exception) -> None:
    def fail() -> None:
        raise error

    works: tuple[Callable[[Ranks], None], ...] = (
        lambda ranks: ranks.on_rank_zero(lambda should_stop: fail()),
        lambda ranks: ranks.all_succeed(fail),
    )
    for work in works:
        with pytest.raises(type(error)) as raised:
            work(one_process())
        assert raised.value is error
    with pytest.raises(Diverged):
        one_process().fail_together(Diverged("NaN"))

"""The vote: the strongest wish wins, and every rank knows it one call later."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import connect, run_ranks

from ddpm_dist.parallel.vote import Vote, Wish


def save_and_stop() -> int:
    ranks, _ = connect()
    wishes = [Wish.NONE, Wish.SAVE, Wish.NONE, Wish.STOP, Wish.NONE]
    if ranks.rank == 0:
        wishes[3] = Wish.SAVE  # rank 1 asks for more in the same step
    elif ranks.rank == 1:
        wishes[1] = Wish.NONE
    answers = [ranks.agree(wish) for wish in wishes]
    ranks.leave()  # one vote has been asked for and not read
    return 0 if answers == [Wish.NONE, Wish.NONE, Wish.SAVE, Wish.NONE, Wish.STOP] else 1


def test_the_strongest_wish_is_known_to_all_one_call_later(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, save_and_stop) == [0, 0]


def ask_twice() -> int:
    import torch.distributed as dist

    ranks, _ = connect()
    vote = Vote(dist.group.WORLD)  # type: ignore[arg-type]
    assert vote.answer() == Wish.NONE, "nobody has asked yet"
    vote.ask(Wish.SAVE)
    with pytest.raises(AssertionError, match="still under way"):
        vote.ask(Wish.NONE)
    assert vote.answer() == Wish.SAVE
    ranks.leave()
    return 0


def test_no_vote_is_asked_for_over_one_that_nobody_has_read(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, ask_twice) == [0, 0]

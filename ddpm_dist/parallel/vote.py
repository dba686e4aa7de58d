"""The vote of all ranks, once a step: go on, save, or stop.

The all-reduce of a vote is launched in step s and read in step s + 1. It runs on the CPU beside the step in between,
so that no rank waits for it.
"""

from __future__ import annotations

import enum

import torch
import torch.distributed as dist
from torch import Tensor


class Wish(enum.IntEnum):
    """What a rank may ask of all between two steps; the greatest wins."""

    NONE = 0
    SAVE = 1
    STOP = 2


class Vote:
    """One all-reduce of wishes at a time. Every rank must call both methods in the same order.

    Args:
        flags: a process group on the CPU that is used for nothing else.
    """

    def __init__(self, flags: dist.ProcessGroup) -> None:
        self._flags = flags
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def ask(self, wish: Wish) -> None:
        """Start a vote with this rank's wish. The one before must have been read. Collective."""
        assert self._under_way is None, "a vote that nobody has read is still under way"
        flag = torch.tensor([wish], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._flags, async_op=True)
        assert work is not None
        self._under_way = (work, flag)

    def answer(self) -> Wish:
        """The strongest wish of any rank in the vote under way, which ends it; NONE where there is no vote."""
        if self._under_way is None:
            return Wish.NONE
        work, flag = self._under_way
        self._under_way = None
        work.wait()
        return Wish(int(flag.item()))

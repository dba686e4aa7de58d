"""The two ways in which `Ranks` does its work: with no other ranks, and connected to them.

Both classes have the same methods, which are described in `Ranks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_dist.parallel.connection import connect
from ddpm_dist.parallel.environment import RankEnvironment, node_name
from ddpm_dist.parallel.failures import Failure, leave_note, read_note
from ddpm_dist.parallel.rank_zero import RankZeroWork
from ddpm_dist.parallel.vote import Vote, Wish

T = TypeVar("T")


class NoPeers:
    """One process is the whole job: what it computes is the sum of all, and what it wants is agreed."""

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self._stop_requested = stop_requested
        self.nodes = [node_name()]
        self.watchdog = None
        self.failure_is_shared = False

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def partners_by_bit(self) -> list[dist.ProcessGroup]:
        return []

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: int) -> list[int]:
        return [value]

    def agree(self, wish: Wish) -> Wish:
        return wish

    def on_rank_zero(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        return work(self._stop_requested)

    def all_succeed(self, work: Callable[[], T]) -> T:
        return work()

    def in_shares(self, work: Callable[[Callable[[], bool]], None]) -> None:
        work(self._stop_requested)

    def report_failure(self, exit_code: int, reason: str) -> None:
        """There is nobody to tell."""

    def reported_failure(self) -> Failure | None:
        return None

    def leave(self) -> None:
        """There is nobody to wait for."""


class ConnectedPeers:
    """The other ranks, reached by collectives (tensors, votes) and through the store (all else).

    Args: those of `Ranks`.
    """

    def __init__(
        self,
        env: RankEnvironment,
        device: torch.device,
        timeout_seconds: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._connection = connect(env, device, timeout_seconds, stop_requested)
        self._vote = Vote(self._connection.flags)
        self._rank_zero = RankZeroWork(self._connection, stop_requested)
        self.nodes = self._connection.nodes
        self.watchdog = self._connection.watchdog

    @property
    def failure_is_shared(self) -> bool:
        return self._rank_zero.failure_is_shared

    def wrap(self, module: nn.Module) -> nn.Module:
        device = self._connection.device
        return DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def partners_by_bit(self) -> list[dist.ProcessGroup]:
        world_size, timeout = self._connection.world_size, self._connection.group_timeout
        if world_size == 2:
            return [cast(dist.ProcessGroup, dist.group.WORLD)]
        self.watchdog.arm()  # gloo knows no time-out while it connects
        groups = []
        for bit in range(world_size.bit_length() - 1):
            pairs = [[rank, rank | 1 << bit] for rank in range(world_size) if not rank >> bit & 1]
            mine, _ = dist.new_subgroups_by_enumeration(pairs, timeout=timeout)
            groups.append(cast(dist.ProcessGroup, mine))
        self.watchdog.disarm()
        return groups

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def gather(self, value: int) -> list[int]:
        values = torch.zeros(self._connection.world_size, dtype=torch.int64, device=self._connection.device)
        values[self._connection.rank] = value
        dist.all_reduce(values)
        return [int(each) for each in values.tolist()]

    def agree(self, wish: Wish) -> Wish:
        answer = self._vote.answer()
        self.watchdog.tick()
        self._vote.ask(wish)
        return answer

    def on_rank_zero(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        return self._rank_zero.do(work)

    def all_succeed(self, work: Callable[[], T]) -> T:
        return self._rank_zero.all_succeed(work)

    def in_shares(self, work: Callable[[Callable[[], bool]], None]) -> None:
        self._rank_zero.in_shares(work)

    def report_failure(self, exit_code: int, reason: str) -> None:
        if self._connection.rank:
            leave_note(self._connection.store, exit_code, self._connection.rank, reason)

    def reported_failure(self) -> Failure | None:
        return read_note(self._connection.store)

    def leave(self) -> None:
        self.watchdog.disarm()
        self._vote.answer()  # no all-reduce may be under way when the process group ends
        self._connection.leave()

"""What ranks do together: train through DDP, add up, agree to stop, wait for rank 0, fail and leave together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.parallel.environment import RankEnvironment
from ddpm_dist.parallel.failures import Failure, RankLost, RankZeroFailed, lost_contact
from ddpm_dist.parallel.peers import ConnectedPeers, NoPeers
from ddpm_dist.parallel.vote import Wish

T = TypeVar("T")


class Ranks:
    """The ranks of one job, as one of them sees them.

    With one process everything is local, and torch.distributed stays unused.
    Collective methods are marked: every rank must call them in the same order.

    Args:
        env: this process among its peers.
        device: decides the backend, NCCL for CUDA and gloo for CPU.
        timeout_seconds: a collective that takes longer is an error, and so is a rank 0 silent for so long.
        stop_requested: whether this process was asked to stop.

    Attributes:
        rank, world_size: of this process; rank is in [0, world_size).
        device: what this rank computes on.
        nodes: on rank 0 the node of every rank, by rank; on the others their own node alone.
        watchdog: ends this process if it hangs in a collective; None where there is only one process.
    """

    def __init__(
        self,
        env: RankEnvironment,
        device: torch.device,
        timeout_seconds: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.rank, self.world_size, self.device = env.rank, env.world_size, device
        self._stop_requested = stop_requested
        self._failing_together = False
        self._peers: NoPeers | ConnectedPeers = NoPeers(stop_requested)
        if env.world_size > 1:
            self._peers = ConnectedPeers(env, device, timeout_seconds, stop_requested)
        self.nodes = self._peers.nodes
        self.watchdog = self._peers.watchdog

    @property
    def is_zero(self) -> bool:
        """Whether this is rank 0, which alone writes files and speaks to the user."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over the ranks. Collective."""
        return self._peers.wrap(module)

    def partners_by_bit(self) -> list[dist.ProcessGroup]:
        """For each bit of a rank's number, lowest first: the group of the two ranks that differ in it. Collective.

        The number of ranks must be a power of two.
        """
        return self._peers.partners_by_bit()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place. Collective.

        Args:
            values: on `device`, of the same shape and dtype on every rank.

        Returns:
            the same tensor.
        """
        return self._peers.sum(values)

    def gather(self, value: int) -> list[int]:
        """An int64 of every rank, by rank. Waits for the device. Collective."""
        return self._peers.gather(value)

    def agree(self, wish: Wish = Wish.NONE) -> Wish:
        """The strongest wish of any rank, the same on every rank at the same call. Collective.

        A rank that was asked to stop wishes to stop, whatever it is called with.

        With several ranks the answer is that of the wishes at the previous call: the all-reduce runs beside the
        step in between, so that nobody waits for it. A single process is answered at once.
        """
        return self._peers.agree(Wish.STOP if self._stop_requested() else wish)

    def on_rank_zero(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        """Rank 0 does the work alone while the others wait outside of any collective. Collective.

        However long the work takes, no collective times out: the others look at a key of the store, and rank 0
        counts up a heartbeat there from a thread. If rank 0 is silent for timeout_seconds, the others give up. A stop
        signal that reaches any rank meanwhile is passed to the work, which may raise StopRequested; then every rank
        raises it.

        Args:
            work: called on rank 0 with `should_stop() -> bool`. What it returns must be plain JSON.

        Returns:
            what the work returned, on every rank.

        Raises:
            StopRequested: on every rank, if the work raised it.
            RankZeroFailed: on the other ranks, if the work raised anything else (which rank 0 itself raises).
            RankLost: on the other ranks, if rank 0 fell silent.
        """
        return self._peers.on_rank_zero(work)

    def all_succeed(self, work: Callable[[], T]) -> T:
        """Every rank does the work, and if it fails on one rank it has failed on all of them. Collective.

        Returns:
            what this rank's work returned.

        Raises:
            UserError: on rank 0, its own or that of another rank, which rank 0 is to report.
            RankZeroFailed: on the other ranks, if rank 0 raised.
            StopRequested: on every rank, if a stop signal came while rank 0 waited for another rank's outcome.
            RankLost: on rank 0, if another rank fell silent; on the other ranks, if rank 0 did.
            Exception: any other, on the rank that met it; rank 0 reports it as an error of that rank.
        """
        return self._peers.all_succeed(work)

    def in_shares(self, work: Callable[[Callable[[], bool]], None]) -> None:
        """Every rank does its share of long work at its own speed, without any collective in between. Collective.

        Ranks that have finished wait as in `on_rank_zero`, however long the others take.

        Args:
            work: called on every rank with `should_stop() -> bool`, which becomes true, a second later at most, when
                any rank was asked to stop or has failed. Then the work is to raise StopRequested.

        Raises:
            StopRequested: on every rank, if any of them was asked to stop.
            Exception: as in `all_succeed`, if the work of a rank raised anything else.
        """
        self._peers.in_shares(work)

    @property
    def failure_is_shared(self) -> bool:
        """Whether all ranks know of the error that ends this one, so that they can leave together."""
        return self._failing_together or self._peers.failure_is_shared

    def fail_together(self, error: UserError) -> NoReturn:
        """End for a reason that every rank has found by itself. Rank 0 raises it, to report it. Collective.

        Raises:
            UserError: the given one, on rank 0.
            RankZeroFailed: on the other ranks.
        """
        self._failing_together = True
        if self.is_zero:
            raise error
        raise RankZeroFailed(error.exit_code)

    def report_failure(self, exit_code: int, reason: str) -> None:
        """Say why this rank ends while the others go on; rank 0 finds it in `reported_failure`."""
        self._peers.report_failure(exit_code, reason)

    def reported_failure(self) -> Failure | None:
        """The failure of a rank that ended alone, if one has said why."""
        return self._peers.reported_failure()

    def lost(self, error: BaseException) -> RankLost:
        """The error of a collective, with the names of the ranks that have fallen silent. Takes some seconds."""
        return lost_contact(error, self.watchdog)

    def leave(self) -> None:
        """End the process group once every rank is here, so that no rank exits while another needs it. Collective."""
        self._peers.leave()

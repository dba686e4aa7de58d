"""How the gradients of one step's micro-batches become one gradient, the same on every rank.

Two ways: `MeanReduction` is what everybody's DistributedDataParallel does. `TreeReduction` adds the gradients of the
logical shards in one binary tree over the shards, whoever computed them, so that the sum is the same to the bit for
every number of ranks (the idea is that of EasyScale, Li et al., SC'23, arXiv:2208.14228).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from ddpm_dist.parallel.ranks import Ranks


class Reduction(Protocol):
    """How the trainer sees either.

    Attributes:
        ddp_model: for the training forward.
        loss_weight: of a micro-batch's mean loss, for its backward.
        rank_weight: what a rank's sum of weighted losses counts in the step's loss.
    """

    ddp_model: nn.Module
    loss_weight: float
    rank_weight: float

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of each micro-batch; after the last one, `.grad` is the step's gradient."""


class MeanReduction:
    """The mean over micro-batches and ranks, added up in whatever order the all-reduce takes."""

    def __init__(self, module: nn.Module, ranks: Ranks, num_micro: int) -> None:
        self.ddp_model = ranks.wrap(module)
        self.loss_weight, self.rank_weight = 1 / num_micro, 1 / ranks.world_size

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else no_sync(self.ddp_model):
            yield


class TreeReduction:
    """The sum over V shards in an order that depends on V alone.

    With V = m 2^k, m odd, the gradients of m neighbouring shards are added one after the other, and the sums of
    these groups in a binary tree. A rank owns V/W consecutive shards, W a power of two: a whole subtree, which a
    binary counter of partial sums builds with as many additions as plain accumulation takes. Above it, ranks that
    differ in one bit of their number add each other's sums, and a + b is b + a. DistributedDataParallel's
    communication hook does that bucket by bucket, beside the backward pass of what is left.

    Every weight must get a gradient from every shard.

    Args:
        module: the network, compiled or not.
        parameters: all of the network's.
        ranks: a power of two that divides the shards.
        num_shards: V.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[nn.Parameter], ranks: Ranks, num_shards: int) -> None:
        self.loss_weight, self.rank_weight = 1 / num_shards, 1.0
        self._parameters = list(parameters)
        self._group_size = num_shards // (num_shards & -num_shards)  # m
        self._group_filled = 0
        self._partial_sums: list[tuple[int, list[Tensor]]] = []  # (groups in it, by parameter), largest first
        self._place = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        self._transport: _Pairs | None = None
        self.ddp_model = ranks.wrap(module)
        if isinstance(self.ddp_model, nn.parallel.DistributedDataParallel):
            self._transport = _Pairs(ranks.partners_by_bit(), ranks.device)
            # DDP looks at the annotations of what it is given, as objects: a lambda has none.
            self.ddp_model.register_comm_hook(None, lambda _, bucket: self._hook(bucket))

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else no_sync(self.ddp_model):
            yield
        if not last:
            self._group_filled += 1
            if self._group_filled == self._group_size:
                self._set_aside()
            return
        if self._transport is None:
            self._fold_into(self._parameters)
        else:
            self._transport.raise_error()
        self._partial_sums.clear()
        self._group_filled = 0

    def _set_aside(self) -> None:
        """Take the gradients of a finished group away: a binary counter, whose digits are partial sums."""
        size, partial = 1, [_gradient(parameter) for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        while self._partial_sums and self._partial_sums[-1][0] == size:
            _, left = self._partial_sums.pop()
            torch._foreach_add_(left, partial)
            size, partial = 2 * size, left
        self._partial_sums.append((size, partial))
        self._group_filled = 0

    def _fold_into(self, parameters: Iterable[Tensor]) -> None:
        """Complete this rank's subtree: the last group's gradients plus all partial sums, smallest first."""
        parameters = list(parameters)
        gradients = [_gradient(parameter) for parameter in parameters]
        for _, partial in reversed(self._partial_sums):
            torch._foreach_add_(gradients, [partial[self._place[id(parameter)]] for parameter in parameters])

    def _hook(self, bucket: dist.GradBucket) -> Future[Tensor]:
        assert self._transport is not None
        # With gradient_as_bucket_view these gradients are the bucket; bucket.gradients() would show memory that is
        # channels_last as if it were contiguous.
        self._fold_into(bucket.parameters())
        return self._transport.sum(bucket.buffer())


class _Pairs:
    """A sum over all ranks as a tree: for each bit of the rank, one all-reduce between the two that differ in it.

    With two ranks that is one plain all-reduce.
    """

    def __init__(self, partners: list[dist.ProcessGroup], device: torch.device) -> None:
        self._partners = partners
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._error: RuntimeError | None = None
        self._jobs: queue.SimpleQueue[tuple[Tensor, Future[Tensor]]] = queue.SimpleQueue()
        if len(partners) > 1 and self._stream is None:
            threading.Thread(target=self._serve, daemon=True, name="reduction").start()

    def sum(self, buffer: Tensor) -> Future[Tensor]:
        """Start it, in place."""
        if len(self._partners) == 1:
            work = dist.all_reduce(buffer, group=self._partners[0], async_op=True)
            assert work is not None
            return work.get_future().then(lambda done: done.value()[0])
        if self._stream is not None:
            return self._sum_on_stream(buffer, self._stream)
        future: Future[Tensor] = Future()
        self._jobs.put((buffer, future))
        return future

    def _sum_on_stream(self, buffer: Tensor, stream: torch.cuda.Stream) -> Future[Tensor]:
        """The stream waits for each all-reduce, and whoever waits for the future waits for the stream."""
        future: Future[Tensor] = Future(devices=[buffer.device])
        stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(stream):
            self._sum_now(buffer)
            future.set_result(buffer)
        return future

    def _serve(self) -> None:
        """One thread takes the buckets in turn: gloo completes its work in another order on each rank."""
        while True:
            buffer, future = self._jobs.get()
            if self._error is None:
                try:
                    self._sum_now(buffer)
                except RuntimeError as error:
                    self._error = error  # set as the future's, DDP would say only that it is no tensor
            future.set_result(buffer)

    def _sum_now(self, buffer: Tensor) -> None:
        for partners in self._partners:
            dist.all_reduce(buffer, group=partners)

    def raise_error(self) -> None:
        """What went wrong in the thread, for the thread that trains."""
        if self._error is not None:
            raise self._error


def no_sync(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Backward passes inside keep their gradients to this rank."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a weight without a gradient: DDP would wait for it for ever"
    return parameter.grad

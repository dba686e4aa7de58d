"""How the gradients of one step's micro-batches become one gradient, the same on every rank.

There are two ways. `MeanReduction` (elastic.mode=stream) is what everybody's DistributedDataParallel does.
`TreeReduction` (elastic.mode=bitwise) adds the gradients of the
logical shards in one binary tree over the shards, whoever computed them, so that the sum is the same to the bit for
every number of ranks (the idea is that of EasyScale, Li et al., SC'23, arXiv:2208.14228).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from ddpm_dist.parallel.ranks import Ranks


@dataclass(frozen=True)
class Probe:
    """How the gradient is computed whose digest tells how this machine rounds (see training.canary).

    Attributes:
        network: for the forward pass.
        num_images: in its batch.
        num_threads: of the CPU; None leaves their number as it is.
    """

    network: nn.Module
    num_images: int
    num_threads: int | None


class Reduction(Protocol):
    """How the training step sees either. All that the two modes do differently is here.

    Attributes:
        ddp_model: for the training forward.
        num_micro_batches: into which this rank's part of a step's batch is split.
        loss_weight: of a micro-batch's mean loss, for its backward.
        rank_weight: what a rank's sum of weighted losses counts in the step's loss.
        needs_warm_up: whether one backward pass has to go before the first step of an attempt.
    """

    ddp_model: nn.Module
    num_micro_batches: int
    loss_weight: float
    rank_weight: float
    needs_warm_up: bool

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of each micro-batch; after the last one, `.grad` is the step's gradient."""

    def dropout_name(self, index: int) -> tuple[int, ...]:
        """What the dropout of the micro-batch with this index depends on, beside seed and step."""

    def for_norm(self, gradients: list[Tensor]) -> list[Tensor]:
        """The same gradients, to compute their norm from."""

    def probe(self, model: nn.Module, micro_batch_size: int) -> Probe:
        """How a canary is computed. model: the bare network. micro_batch_size: images of one training forward."""

    def repeats_on(self, device: torch.device) -> bool:
        """Whether the same gradient is computed in the same bits each time on such a device."""


def shards_of(ranks: Ranks, num_shards: int) -> range:
    """The consecutive logical shards that this rank computes."""
    count = num_shards // ranks.world_size
    return range(ranks.rank * count, (ranks.rank + 1) * count)


class MeanReduction:
    """The mean over micro-batches and ranks, added up in whatever order the all-reduce takes.

    Args:
        module: the network, compiled or not.
        num_shards: V; this rank's micro-batches together are V / W of them.
        num_micro_batches: of this rank.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, num_shards: int, num_micro_batches: int) -> None:
        self.ddp_model = ranks.wrap(module)
        self.num_micro_batches = num_micro_batches
        self.loss_weight, self.rank_weight = 1 / num_micro_batches, 1 / ranks.world_size
        # DDP packs gradients into buckets anew after its first backward. With three or more ranks the packing decides
        # in which order they are added.
        self.needs_warm_up = ranks.world_size > 2
        self._first_shard = shards_of(ranks, num_shards).start

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else no_sync(self.ddp_model):
            yield

    def dropout_name(self, index: int) -> tuple[int, ...]:
        return (self._first_shard, index)

    def for_norm(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients

    def probe(self, model: nn.Module, micro_batch_size: int) -> Probe:
        # One image, since micro-batches may be as large as the memory. One thread, since their number may change with
        # that of the ranks. The bare model: torch.compile would specialise on a shape that never comes again.
        return Probe(model, num_images=1, num_threads=1)

    def repeats_on(self, device: torch.device) -> bool:
        return device.type == "cpu"  # kernels of CUDA may add in another order each time


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
        self._shards, self._module = shards_of(ranks, num_shards), module
        self.num_micro_batches = len(self._shards)
        self.loss_weight, self.rank_weight = 1 / num_shards, 1.0
        self.needs_warm_up = False
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

    def dropout_name(self, index: int) -> tuple[int, ...]:
        return (self._shards[index],)  # the shard alone decides, whoever computes it

    def for_norm(self, gradients: list[Tensor]) -> list[Tensor]:
        # Copies. On CUDA the order of a sum depends on how its memory is aligned, and gradients inside a DDP bucket
        # are aligned otherwise than those of one process.
        return list(torch._foreach_mul(gradients, 1.0))

    def probe(self, model: nn.Module, micro_batch_size: int) -> Probe:
        return Probe(self._module, num_images=micro_batch_size, num_threads=None)  # exactly as in a step

    def repeats_on(self, device: torch.device) -> bool:
        return True  # deterministic kernels are asked for on CUDA

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

    def _hook(self, bucket: GradBucket) -> Future[Tensor]:
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

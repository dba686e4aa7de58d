"""Batches that are a pure function of the step: images, timesteps and noise of this rank's logical shards.

The global batch of step s consists of V shards of b images. A DistributedSampler orders the images of each shard; a
generator seeded by (seed, s, shard) draws its timesteps and noise. Each of the W ranks computes V/W consecutive
shards. What a shard contains does not depend on the rank that computes it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from ddpm_dist.data.images import Images
from ddpm_dist.diffusion.pixels import from_uint8
from ddpm_dist.diffusion.timesteps import TimestepSampler
from ddpm_dist.errors import DataError
from ddpm_dist.randomness import derive_seed, generator
from ddpm_dist.run.preemption import ignore_in_child


class Batch(NamedTuple):
    """One rank's part of one step.

    Attributes:
        images: uint8 [B, C, H, W] in [0, 255].
        t: int64 [B] in [0, T-1].
        noise: float32 [B, C, H, W], standard normal.
        cond: what the network is conditioned on, each [B, ...]; empty without conditioning.
    """

    images: Tensor
    t: Tensor
    noise: Tensor
    cond: Mapping[str, Tensor]

    def parts(self, number: int) -> list[Batch]:
        """This many consecutive parts of equal size, for instance the micro-batches of a step.

        Args:
            number: a divisor of B.
        """
        images, t, noise = (whole.chunk(number) for whole in (self.images, self.t, self.noise))
        conds = {name: whole.chunk(number) for name, whole in self.cond.items()}
        return [
            Batch(images[place], t[place], noise[place], {name: parts[place] for name, parts in conds.items()})
            for place in range(number)
        ]


def join(batches: Sequence[Batch]) -> Batch:
    """The batches, one after the other, as one batch.

    Args:
        batches: at least one; all have the same names in `cond`.
    """
    images, t, noise = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "t", "noise"))
    return Batch(
        images, t, noise, {name: torch.cat([batch.cond[name] for batch in batches]) for name in batches[0].cond}
    )


def blank(images: Images, num: int) -> Batch:
    """A batch of the right shapes and types, whose images, timesteps and noise are all zero.

    Args:
        images: give the shape, and the conditions: those of the first `num` images.
        num: size of the batch, at most the number of images.
    """
    pixels = torch.zeros(num, *images.shape, dtype=torch.uint8)
    t = torch.zeros(num, dtype=torch.int64)
    return Batch(pixels, t, torch.zeros(pixels.shape), images.conditions(range(num)))


class Inputs(NamedTuple):
    """A micro-batch as the loss takes it, on the device that computes.

    Attributes:
        x_start: float32 [B, C, H, W] in [-1, 1].
        t: int64 [B] in [0, T-1].
        noise: float32 [B, C, H, W], standard normal.
        cond: what the network is conditioned on, each [B, ...].
    """

    x_start: Tensor
    t: Tensor
    noise: Tensor
    cond: dict[str, Tensor]


@dataclass(frozen=True)
class Placement:
    """Where the inputs of the network lie.

    Attributes:
        device: that computes.
        channels_last: NHWC memory format.
    """

    device: torch.device
    channels_last: bool

    def inputs(self, batch: Batch) -> Inputs:
        """The batch on the device, its images scaled to [-1, 1]. Does not wait for the device."""
        images, t, noise = (part.to(self.device, non_blocking=True) for part in (batch.images, batch.t, batch.noise))
        cond = {name: values.to(self.device, non_blocking=True) for name, values in batch.cond.items()}
        x_start = from_uint8(images)
        if self.channels_last:
            x_start = x_start.contiguous(memory_format=torch.channels_last)
            noise = noise.contiguous(memory_format=torch.channels_last)
        return Inputs(x_start, t, noise, cond)

    def micro_batches(self, batch: Batch, number: int) -> list[Inputs]:
        """The inputs of a training step, in equal parts."""
        return [self.inputs(part) for part in batch.parts(number)]


class StepBatches(Dataset[Batch]):
    """This rank's part of the batch of any step: `batches[step]`, for steps >= 0 in any order.

    Args:
        images: the data set.
        seed: run.seed.
        batch_size: images of the global batch, a multiple of num_shards.
        num_shards: V, the number of logical shards.
        shards: the shards that this rank computes.
        timesteps: draws the timestep of each image.
        flip: whether to mirror each image left-right with probability 1/2.
        label_dropout: the probability with which a label is replaced by the null label, which is num_classes. So the
            network also learns the images of no class in particular (Ho & Salimans 2022, arXiv:2207.12598).

    Attributes:
        steps_per_epoch: number of global batches in one pass over the images.
    """

    def __init__(
        self,
        images: Images,
        *,
        seed: int,
        batch_size: int,
        num_shards: int,
        shards: range,
        timesteps: TimestepSampler,
        flip: bool = False,
        label_dropout: float = 0.0,
    ) -> None:
        assert batch_size % num_shards == 0, "config validation lets only multiples through"
        self._images, self._seed, self._shards = images, seed, shards
        self._timesteps, self._flip, self._label_dropout = timesteps, flip, label_dropout
        self._per_shard = batch_size // num_shards
        # Images that do not fill a last batch are left out. Each epoch is shuffled anew, so each leaves out others.
        self.steps_per_epoch = len(images) // batch_size
        self._samplers: dict[int, DistributedSampler[int]] = {
            shard: DistributedSampler(
                range(len(images)),  # type: ignore[arg-type]  # only its length is asked for
                num_replicas=num_shards,
                rank=shard,
                seed=derive_seed(seed, "order"),
                drop_last=True,
            )
            for shard in shards
        }
        self._order: tuple[int, dict[int, list[int]]] = (-1, {})

    def __getitem__(self, step: int) -> Batch:
        """This rank's part of the batch of a step. Raises DataError if an image cannot be read."""
        return join([self._shard(step, shard) for shard in self._shards])

    def indices(self, step: int, shard: int) -> list[int]:
        """The indices of the images of one shard, at one step.

        Args:
            step: at least 0.
            shard: one of this rank's.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            for sampler in self._samplers.values():
                sampler.set_epoch(epoch)
            self._order = (epoch, {shard: list(sampler) for shard, sampler in self._samplers.items()})
        start = position * self._per_shard
        return self._order[1][shard][start : start + self._per_shard]

    def _shard(self, step: int, shard: int) -> Batch:
        indices = self.indices(step, shard)
        images = self._images.fetch(indices)
        if self._flip:
            mirrored = torch.rand(len(images), generator=generator(self._seed, "flip", step, shard)) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        draw = generator(self._seed, "noise", step, shard)
        t = self._timesteps.draw(draw, len(images))
        noise = torch.randn(images.shape, generator=draw)
        return Batch(images, t, noise, self._conditions(indices, step, shard))

    def _conditions(self, indices: list[int], step: int, shard: int) -> dict[str, Tensor]:
        """What the network is told of these images. The generator of label dropout has no other purpose."""
        cond = self._images.conditions(indices)
        if self._label_dropout and "labels" in cond:
            draw = generator(self._seed, "label dropout", step, shard)
            dropped = torch.rand(len(indices), generator=draw) < self._label_dropout
            cond = {**cond, "labels": cond["labels"].masked_fill(dropped, self._images.num_classes)}
        return cond


class _ErrorsAsValues(Dataset["Batch | DataError"]):
    """Returns a DataError instead of raising it: raised in a worker process, it would arrive inside a traceback."""

    def __init__(self, batches: StepBatches) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self._batches[step]
        except DataError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def iterate(batches: StepBatches, start: int, stop: int, num_workers: int, pin_memory: bool) -> Generator[Batch]:
    """The batches of the steps start .. stop - 1. Worker processes, if there are any, make them ahead of time.

    The caller must close the generator, which ends the worker processes.

    Args:
        batches: makes the batch of each step.
        start: the first step.
        stop: the step after the last one.
        num_workers: number of worker processes; with 0 the caller's process makes the batches.
        pin_memory: whether the tensors lie in pinned memory, for copies to a GPU.

    Raises:
        DataError: an image could not be read.
    """
    loader = DataLoader(
        _ErrorsAsValues(batches),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=ignore_in_child,
        # An iterator of a DataLoader draws a seed when it is made. With a generator of its own it does not draw from
        # the global one.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch

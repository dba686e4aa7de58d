"""Batches that are a pure function of the step: images, timesteps and noise of this rank's logical shards.

The global batch of step s is V shards of b images. A DistributedSampler orders the images of each shard, a
generator of (seed, s, shard) draws its timesteps and noise. A rank computes V/W consecutive shards; which rank
that is changes nothing in what a shard contains.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from ddpm_dist.data.datasets import Images
from ddpm_dist.errors import DataError
from ddpm_dist.randomness import derive_seed, generator
from ddpm_dist.run.preemption import ignore_in_child


class Batch(NamedTuple):
    """One rank's part of one step.

    Attributes:
        images: uint8 [B, C, H, W] in [0, 255].
        t: int64 [B] in [0, T-1].
        noise: float32 [B, C, H, W], standard normal.
    """

    images: Tensor
    t: Tensor
    noise: Tensor


class StepBatches(Dataset[Batch]):
    """batches[step] for any step >= 0, in any order.

    Args:
        images: the data set.
        seed: run.seed.
        batch_size: global, a multiple of num_shards.
        num_shards: V, the logical shards.
        shards: those that this rank computes.
        num_timesteps: T.
        flip: mirror each image left-right with probability 1/2.
    """

    def __init__(
        self,
        images: Images,
        *,
        seed: int,
        batch_size: int,
        num_shards: int,
        shards: range,
        num_timesteps: int,
        flip: bool = False,
    ) -> None:
        assert batch_size % num_shards == 0, "config validation lets only multiples through"
        self._images, self._seed, self._shards = images, seed, shards
        self._num_timesteps, self._flip = num_timesteps, flip
        self._per_shard = batch_size // num_shards
        self.steps_per_epoch = len(images) // batch_size  # what is left over waits for another shuffle
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
        parts = [self._shard(step, shard) for shard in self._shards]
        return Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def indices(self, step: int, shard: int) -> list[int]:
        """Which images make up a shard of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            for sampler in self._samplers.values():
                sampler.set_epoch(epoch)
            self._order = (epoch, {shard: list(sampler) for shard, sampler in self._samplers.items()})
        start = position * self._per_shard
        return self._order[1][shard][start : start + self._per_shard]

    def _shard(self, step: int, shard: int) -> Batch:
        images = self._images.fetch(self.indices(step, shard))
        if self._flip:
            mirrored = torch.rand(len(images), generator=generator(self._seed, "flip", step, shard)) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        draw = generator(self._seed, "noise", step, shard)
        t = torch.randint(0, self._num_timesteps, (len(images),), generator=draw)
        return Batch(images, t, torch.randn(images.shape, generator=draw))


class _ErrorsAsValues(Dataset["Batch | DataError"]):
    """Hands a DataError over as a value: raised in a worker process it would arrive wrapped in a traceback."""

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
    """Batches of the steps start .. stop - 1, made ahead by worker processes if there are any.

    Close it when done: that ends the workers.

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
        # An iterator draws a seed when it is made; from a generator of its own, so that training's is untouched.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch

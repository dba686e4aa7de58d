"""The training step: what one global step does to the weights, their average and the optimizer."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.config import Config, to_flat
from ddpm_dist.data.batches import Batch
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.models.ema import EMA
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.reduction import MeanReduction, Reduction, TreeReduction
from ddpm_dist.randomness import generator, seed_default_generators
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.training.optim import learning_rate
from ddpm_dist.training.precision import Numerics


@dataclass(frozen=True)
class WindowMeans:
    """Means over ranks and steps since the last line of metrics.jsonl.

    Attributes:
        loss, grad_norm: of the steps whose update was applied, NaN if there were none; the norm before clipping.
        skipped: updates that were left out, because a gradient was NaN or inf.
        most_in_a_row: the longest series of such updates that was not over before the window.
    """

    loss: float
    grad_norm: float
    skipped: int
    most_in_a_row: int


class Trainer:
    """Weights, average, optimizer and scaler, moved on by `train_step`.

    Args:
        config: the run's.
        ranks: this process and its peers.
        numerics: the choices made at step 0.
        diffusion: on the ranks' device.
        model: the bare network: state_dict, average, sampling.
        ema: its average.
        optimizer: over model's parameters.
        shards: the logical shards that this rank computes.
        decay_steps: where the cosine ends.
    """

    def __init__(
        self,
        *,
        config: Config,
        ranks: Ranks,
        numerics: Numerics,
        diffusion: GaussianDiffusion,
        model: nn.Module,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        shards: range,
        decay_steps: int,
    ) -> None:
        self.config, self.ranks, self.numerics, self.diffusion = config, ranks, numerics, diffusion
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.bitwise = config.elastic.mode == "bitwise"
        self._network: nn.Module = torch.compile(model) if numerics.compile else model  # type: ignore[assignment]
        self._shards, self._decay_steps = shards, decay_steps
        self._parameters = list(model.parameters())
        self._num_micro = len(shards) if self.bitwise else self._count_micro_batches()
        # DDP around the compiled model, so that its gradient traffic still overlaps with backward.
        self._reduction = self._reduce()
        self.ddp_model = self._reduction.ddp_model
        self.scaler = numerics.scaler(ranks.device)
        self.step = 0
        # Since the last log line. On the device: reading them would make it wait.
        self._sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # loss, gradient norm, applied updates
        self._skips = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # skipped, in a row now, most in a row

    def _count_micro_batches(self) -> int:
        per_rank = self.config.data.batch_size // self.ranks.world_size
        return max(1, per_rank // (self.config.train.micro_batch_size or per_rank))

    def _reduce(self) -> Reduction:
        if self.bitwise:
            return TreeReduction(self._network, self._parameters, self.ranks, self.config.elastic.shards)
        return MeanReduction(self._network, self.ranks, self._num_micro)

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return learning_rate(self.step, self.config.optim, self._decay_steps)

    def train_step(self, batch: Batch) -> None:
        """One update of the weights from one global batch, of which this is our part. Collective.

        Ho et al. 2020, algorithm 1 (arXiv:2006.11239). Nothing here waits for the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        step_loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        micro_batches = zip(*(whole.chunk(self._num_micro) for whole in self._to_device(batch)), strict=True)
        for index, (x_start, t, noise) in enumerate(micro_batches):
            self._seed_dropout(index)
            with self._reduction.micro_batch(last=index == self._num_micro - 1):
                loss = self._loss(self.ddp_model, x_start, t, noise) * self._reduction.loss_weight
                self.scaler.scale(loss).backward()
            step_loss += loss.detach()

        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip_gradients()
        self._update_weights(grad_norm)
        self.ema.update(self.step)
        self._count(step_loss * self._reduction.rank_weight, grad_norm)
        self.step += 1

    def _seed_dropout(self, index: int) -> None:
        """A micro-batch's own dropout: in bitwise mode it is a shard, and the shard alone decides."""
        name = (self._shards[index],) if self.bitwise else (self._shards.start, index)
        seed_default_generators(self.ranks.device, self.config.run.seed, "dropout", self.step, *name)

    def _loss(self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The mean over a micro-batch. Its tensors are made here, so that their memory is aligned alike everywhere."""
        x_t = self.diffusion.q_sample(x_start, t, noise)
        with self.numerics.autocast(self.ranks.device):
            eps_pred = network(x_t, t)
        return self.diffusion.loss(eps_pred.float(), noise)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x_start float32 [B, C, H, W] in [-1, 1]; t int64 [B]; noise float32 [B, C, H, W]."""
        images, t, noise = (part.to(self.ranks.device, non_blocking=True) for part in batch)
        x_start = images.float() / 127.5 - 1
        if self.numerics.channels_last:
            x_start = x_start.contiguous(memory_format=torch.channels_last)
            noise = noise.contiguous(memory_format=torch.channels_last)
        return x_start, t, noise

    def _clip_gradients(self) -> Tensor:
        """The global gradient norm before clipping; call it after unscale_, never before."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self.bitwise:
            # Copies: on CUDA the order of a sum depends on how its memory is aligned, and a DDP bucket aligns its
            # parts otherwise than one process does.
            gradients = list(torch._foreach_mul(gradients, 1.0))
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optim.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.config.optim.grad_clip, norm)
        return norm

    def _update_weights(self, grad_norm: Tensor) -> None:
        """Adam's update, unless a gradient is NaN or inf: all ranks have the same ones, so they agree."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        elif self.config.optim.fused:
            self.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif torch.isfinite(grad_norm):  # this waits for the device; the fused kernel does not
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()

    def _count(self, loss: Tensor, grad_norm: Tensor) -> None:
        applied = torch.isfinite(grad_norm)
        # A rank's part, so that the sum over ranks weighs every step alike, however many ranks there were.
        same_everywhere = torch.stack([grad_norm.double(), torch.ones_like(loss)]) / self.ranks.world_size
        self._sums += torch.where(applied, torch.cat([loss[None], same_everywhere]), 0)
        in_a_row = torch.where(applied, 0, self._skips[1] + 1)
        self._skips[0] += ~applied
        self._skips[1] = in_a_row
        self._skips[2] = torch.maximum(self._skips[2], in_a_row)

    def take_means(self) -> WindowMeans:
        """Means since the last call, which the next call starts from. Waits for the device. Collective."""
        loss, grad_norm, applied = self.ranks.sum(self._sums).tolist()
        skipped, in_a_row, most = (int(count) for count in self._skips.tolist())
        self._sums.zero_()
        self._skips.copy_(torch.tensor([0, in_a_row, in_a_row]))
        applied = applied or math.nan
        return WindowMeans(loss / applied, grad_norm / applied, skipped, most)

    def warm_up(self, image_shape: tuple[int, int, int]) -> None:
        """Have DDP settle how it packs gradients into buckets, which it does after its first backward. Collective.

        With three or more ranks the packing decides in which order they are added: without this the first step of
        every attempt would round otherwise than the same step of an undisturbed run.
        """
        if self.bitwise or self.ranks.world_size < 3:
            return
        num = self.config.data.batch_size // self.ranks.world_size // self._num_micro
        zeros = self._zero_batch(num, image_shape)
        self._loss(self.ddp_model, *self._to_device(zeros)).backward()
        self.optimizer.zero_grad()

    @staticmethod
    def _zero_batch(num: int, image_shape: tuple[int, int, int]) -> Batch:
        images = torch.zeros(num, *image_shape, dtype=torch.uint8)
        return Batch(images, torch.zeros(num, dtype=torch.int64), torch.zeros(images.shape))

    def canary(self, image_shape: tuple[int, int, int]) -> str:
        """Digest of the gradient of one shard at the weights of step 0 (in stream mode of one image, since shards may
        be larger than what memory holds): how this machine rounds.

        The same wherever a run continues to the bit, whatever the number of ranks. Call it before `load`. Leaves
        weights and gradients alone.
        """
        assert self.step == 0, "the weights of step 0 are the only ones that every attempt has"
        draw = generator(self.config.run.seed, "canary")
        num = self.config.data.batch_size // self.config.elastic.shards if self.bitwise else 1
        images = torch.randint(0, 256, (num, *image_shape), dtype=torch.uint8, generator=draw)
        t = torch.randint(0, self.config.diffusion.num_timesteps, (num,), generator=draw)
        batch = self._to_device(Batch(images, t, torch.randn(images.shape, generator=draw)))
        seed_default_generators(self.ranks.device, self.config.run.seed, "canary dropout")
        threads = torch.get_num_threads()
        if not self.bitwise:
            torch.set_num_threads(1)  # their number may change with that of the ranks
        # In stream mode shards are no micro-batches: torch.compile would specialise on a shape that never comes.
        network = self._network if self.bitwise else self.model
        gradients = torch.autograd.grad(self._loss(network, *batch), self._parameters)
        torch.set_num_threads(threads)
        digest = hashlib.blake2b(digest_size=8)
        for gradient in gradients:
            digest.update(gradient.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def drifted_ranks(self) -> list[int]:
        """Ranks whose weights are not rank 0's, to the bit; broken hardware does that. Collective."""
        # The sum of the bits as whole numbers: exact in any order, and any single flip changes it.
        bits = [parameter.detach().reshape(-1).view(torch.int32).sum() for parameter in self._parameters]
        digests = self.ranks.gather(int(torch.stack(bits).sum()))
        return [rank for rank, digest in enumerate(digests) if digest != digests[0]]

    def checkpoint(self, contract: dict[str, Any]) -> Checkpoint:
        """All that the run needs to go on from here. Collective."""
        # Rank 0 holds the sums of all from here on, so that the curve goes on over a resume without a seam.
        self.ranks.sum(self._sums)
        if not self.ranks.is_zero:
            self._sums.zero_()
        return Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            window=torch.cat([self._sums, self._skips]).cpu(),
            config=to_flat(self.config),
            contract=contract,
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; the number of ranks may be another than when it was saved."""
        self.step = checkpoint.step
        self.model.load_state_dict(checkpoint.model)
        self.ema.load_state_dict(checkpoint.ema)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.scaler.load_state_dict(checkpoint.scaler)
        sums, skips = checkpoint.window.split(3)
        self._skips.copy_(skips)
        if self.ranks.is_zero:
            self._sums.copy_(sums)

"""The training step: what one global step does to the weights, their average and the optimizer."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.config import Config, to_flat
from ddpm_dist.data.batches import Batch
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.models.ema import EMA
from ddpm_dist.parallel.distributed import Ranks
from ddpm_dist.parallel.rng import seed_default_generators
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
        first_shard: the first logical shard that this rank computes.
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
        first_shard: int,
        decay_steps: int,
    ) -> None:
        self.config, self.ranks, self.numerics, self.diffusion = config, ranks, numerics, diffusion
        self.model, self.ema, self.optimizer = model, ema, optimizer
        # DDP around the compiled model, so that its gradient traffic still overlaps with backward.
        self.ddp_model = ranks.wrap(torch.compile(model) if numerics.compile else model)  # type: ignore[arg-type]
        self.scaler = numerics.scaler(ranks.device)
        self.step = 0
        self._first_shard, self._decay_steps = first_shard, decay_steps
        self._parameters = list(model.parameters())
        # Since the last log line. On the device: reading them would make it wait.
        self._sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # loss, gradient norm, applied updates
        self._skips = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # skipped, in a row now, most in a row
        self._num_micro = self._count_micro_batches()

    def _count_micro_batches(self) -> int:
        per_rank = self.config.data.batch_size // self.ranks.world_size
        return max(1, per_rank // (self.config.train.micro_batch_size or per_rank))

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return learning_rate(self.step, self.config.optim, self._decay_steps)

    def train_step(self, batch: Batch) -> None:
        """One update of the weights from one global batch, of which this is our part. Collective.

        Ho et al. 2020, algorithm 1 (arXiv:2006.11239). Nothing here waits for the device.
        """
        x_start, t, noise = self._to_device(batch)
        x_t = self.diffusion.q_sample(x_start, t, noise)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        seed_default_generators(self.ranks.device, self.config.run.seed, "dropout", self.step, self._first_shard)

        step_loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        micro_batches = zip(*(whole.chunk(self._num_micro) for whole in (x_t, t, noise)), strict=True)
        for index, (x_micro, t_micro, noise_micro) in enumerate(micro_batches, start=1):
            last = index == self._num_micro
            with contextlib.nullcontext() if last else self.ranks.no_sync(self.ddp_model):
                with self.numerics.autocast(self.ranks.device):
                    eps_pred = self.ddp_model(x_micro, t_micro)
                loss = self.diffusion.loss(eps_pred.float(), noise_micro) / self._num_micro
                self.scaler.scale(loss).backward()
            step_loss += loss.detach()

        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip_gradients()
        self._update_weights(grad_norm)
        self.ema.update(self.step)
        self._count(step_loss, grad_norm)
        self.step += 1

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
        sums = torch.stack([loss, grad_norm.double(), torch.ones_like(loss)]) / self.ranks.world_size
        self._sums += torch.where(applied, sums, 0)
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

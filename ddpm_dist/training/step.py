"""The training step: what one global step does to the weights, their averages and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.data.batches import Inputs, Placement, blank
from ddpm_dist.data.images import Images
from ddpm_dist.diffusion.losses import DenoisingLoss
from ddpm_dist.models.averages import Average
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.reduction import Reduction
from ddpm_dist.randomness import seed_default_generators
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.training.statistics import Statistics
from ddpm_dist.training.update import Update


class Trainer:
    """The state that is learned: weights, averages, optimizer and scaler. `train_step` moves it on by one step.

    Args:
        ranks: this process and its peers.
        seed: run.seed, for dropout.
        model: the bare network, which is saved, averaged and sampled from.
        placement: where micro-batches lie, in the memory format of the weights.
        micro_batch_size: images of one forward pass on this rank.
        loss: its tables lie on the ranks' device.
        reduction: makes one gradient out of those of all micro-batches of all ranks.
        update: updates the model's parameters.
        averages: of the model's weights, by name; `ema` is among them.
        statistics: counts loss, gradient norm and skipped updates.

    Attributes:
        step: number of finished steps. With the seed it fixes learning rate, images, timesteps, noise and dropout.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        seed: int,
        model: nn.Module,
        placement: Placement,
        micro_batch_size: int,
        loss: DenoisingLoss,
        reduction: Reduction,
        update: Update,
        averages: Mapping[str, Average],
        statistics: Statistics,
    ) -> None:
        self.ranks, self.model, self.loss = ranks, model, loss
        self.reduction, self.update, self.averages, self.statistics = reduction, update, averages, statistics
        self.placement, self.micro_batch_size, self._seed = placement, micro_batch_size, seed
        self.step = 0

    def train_step(self, micro_batches: Sequence[Inputs]) -> None:
        """Update the weights once, from one global batch. Collective.

        Ho et al. 2020, algorithm 1 (arXiv:2006.11239). Nothing here waits for the device.

        Args:
            micro_batches: this rank's parts of the global batch of `step`.
        """
        step_loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for index, inputs in enumerate(micro_batches):
            self._seed_dropout(index)
            with self.reduction.micro_batch(last=index == len(micro_batches) - 1):
                loss = self.loss.mean(self.reduction.ddp_model, *inputs) * self.reduction.loss_weight
                self.update.scale(loss).backward()
            step_loss += loss.detach()

        grad_norm = self.update.apply(self.step)
        for average in self.averages.values():
            average.update(self.step)
        self.statistics.count(step_loss * self.reduction.rank_weight, grad_norm)
        self.step += 1

    def _seed_dropout(self, index: int) -> None:
        """Seed the dropout of a micro-batch: it depends on the step, and not on what was drawn before."""
        name = self.reduction.dropout_name(index)
        seed_default_generators(self.ranks.device, self._seed, "dropout", self.step, *name)

    def warm_up(self, images: Images) -> None:
        """Let the reduction settle in which order it adds gradients, before the first step. Collective.

        Without this, the first step of an attempt could round differently from the same step of an undisturbed run.
        The weights do not change.

        Args:
            images: only their shape and their conditions are used.
        """
        if self.reduction.needs_warm_up:
            inputs = self.placement.inputs(blank(images, self.micro_batch_size))
            self.loss.mean(self.reduction.ddp_model, *inputs).backward()
            self.update.zero_grad()

    def checkpoint(self, config: Mapping[str, Any], contract: Mapping[str, Any]) -> Checkpoint:
        """A checkpoint of this step, with all that the run needs to go on from here. Collective.

        Its tensors are the trainer's own, not copies: the next step changes them.

        Args:
            config: {dotted key: value}, resolved.
            contract: what was decided at step 0.
        """
        optimizer, scaler = self.update.state_dicts()
        return Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            ema=self.averages["ema"].state_dict(),
            optimizer=optimizer,
            scaler=scaler,
            window=self.statistics.window(),
            config=dict(config),
            contract=dict(contract),
            averages={name: average.state_dict() for name, average in self.averages.items() if name != "ema"},
        )

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with these weights in place of the random ones, and every average with them.

        Args:
            weights: by the names of the model's state_dict. Others are left out, and what is not there stays random.
        """
        self.model.load_state_dict(weights, strict=False)
        for average in self.averages.values():
            average.load_state_dict(self.model.state_dict())

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over step and state of a checkpoint. It may have been saved on another number of ranks."""
        self.step = checkpoint.step
        self.model.load_state_dict(checkpoint.model)
        for name, average in self.averages.items():
            average.load_state_dict(checkpoint.ema if name == "ema" else checkpoint.averages[name])
        self.update.load_state_dicts(checkpoint.optimizer, checkpoint.scaler)
        self.statistics.load_window(checkpoint.window)

"""Parts of a run from its config."""

from __future__ import annotations

import torch
from torch import nn

from ddpm_dist.config import Config
from ddpm_dist.data.batches import StepBatches
from ddpm_dist.data.datasets import Images
from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas
from ddpm_dist.models.ema import EMA
from ddpm_dist.models.unet import UNet
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.randomness import derive_seed
from ddpm_dist.training.optim import build_optimizer
from ddpm_dist.training.precision import Numerics
from ddpm_dist.training.trainer import Trainer


def build_model(config: Config, image_channels: int, device: torch.device, channels_last: bool) -> nn.Module:
    """The network with the weights of step 0, the same on every rank."""
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    model = UNet(image_channels, config.model.channels, config.model.time_embed_dim, config.model.dropout)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def build_diffusion(config: Config, device: torch.device) -> GaussianDiffusion:
    diffusion = config.diffusion
    return GaussianDiffusion(linear_betas(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end), device)


def local_shards(config: Config, ranks: Ranks) -> range:
    """The consecutive logical shards that this rank computes."""
    count = config.elastic.shards // ranks.world_size
    return range(ranks.rank * count, (ranks.rank + 1) * count)


def build_trainer(
    config: Config, ranks: Ranks, numerics: Numerics, image_channels: int, decay_steps: int | None
) -> Trainer:
    """A trainer at step 0. Collective.

    Args:
        decay_steps: where the cosine ends; None for a constant rate.
    """
    model = build_model(config, image_channels, ranks.device, numerics.channels_last)
    return Trainer(
        config=config,
        ranks=ranks,
        numerics=numerics,
        diffusion=build_diffusion(config, ranks.device),
        model=model,
        ema=EMA(model, config.ema.decay),
        optimizer=build_optimizer(model, config.optim),
        shards=local_shards(config, ranks),
        decay_steps=decay_steps or 0,
    )


def build_batches(config: Config, ranks: Ranks, images: Images) -> StepBatches:
    """This rank's part of every step's batch."""
    return StepBatches(
        images,
        seed=config.run.seed,
        batch_size=config.data.batch_size,
        num_shards=config.elastic.shards,
        shards=local_shards(config, ranks),
        num_timesteps=config.diffusion.num_timesteps,
        flip=config.data.flip,
    )

"""Parts of a run from its config: the names in it are looked up in the tables of each wing, here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddpm_dist.config import Config
from ddpm_dist.data.batches import StepBatches
from ddpm_dist.data.images import Images
from ddpm_dist.diffusion.losses import LOSSES, Autocast, DenoisingLoss
from ddpm_dist.diffusion.predictions import PREDICTIONS, Prediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS
from ddpm_dist.diffusion.schedules import SCHEDULES
from ddpm_dist.diffusion.timesteps import TIMESTEP_SAMPLERS
from ddpm_dist.errors import ConfigError
from ddpm_dist.models.averages import EMA
from ddpm_dist.models.networks import NETWORKS
from ddpm_dist.randomness import derive_seed

TABLES: dict[str, Mapping[str, Any]] = {
    "diffusion.schedule": SCHEDULES,
    "diffusion.prediction": PREDICTIONS,
    "loss.weighting": LOSSES,
    "loss.timestep_sampler": TIMESTEP_SAMPLERS,
    "model.name": NETWORKS,
    "preview.sampler": SAMPLERS,
}
"""The table in which the value of each such key is looked up."""


def check_names(config: Config) -> None:
    """Names that stand in a table, and the rules of the chosen network.

    Raises:
        ConfigError: names the key, the value and what would be valid.
    """
    for key, name in config.named_parts().items():
        if name not in TABLES[key]:
            raise ConfigError(f"{key}={name}: expected one of {', '.join(TABLES[key])}")
    try:
        NETWORKS[config.model.name].check(config.model)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def size_divisor(config: Config) -> int:
    """Height and width of the images must be multiples of it."""
    return NETWORKS[config.model.name].size_divisor


def build_process(config: Config, device: torch.device) -> GaussianDiffusion:
    """The forward process of the config's schedule, with its tables on the device."""
    diffusion = config.diffusion
    schedule = SCHEDULES[diffusion.schedule]
    return GaussianDiffusion(schedule(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end), device)


def build_prediction(config: Config, process: GaussianDiffusion) -> Prediction:
    """What the network predicts."""
    return PREDICTIONS[config.diffusion.prediction](process)


def build_loss(config: Config, process: GaussianDiffusion, autocast: Autocast) -> DenoisingLoss:
    """The training loss."""
    return LOSSES[config.loss.weighting](process, build_prediction(config, process), autocast)


def build_model(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    channels_last: bool,
) -> nn.Module:
    """The network with the weights of step 0, the same on every rank.

    Args:
        image_shape: (C, H, W).
        num_classes: 0 without labels.
        channels_last: NHWC memory format.
    """
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    model = NETWORKS[config.model.name].build(config.model, image_shape, num_classes).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def build_averages(config: Config, model: nn.Module) -> dict[str, EMA]:
    """The averages of the weights by name; `ema` is the one that previews and samples are drawn from."""
    return {"ema": EMA(model, config.ema.decay)}


def build_batches(config: Config, shards: range, images: Images) -> StepBatches:
    """The part of every step's batch that is made of the given logical shards."""
    return StepBatches(
        images,
        seed=config.run.seed,
        batch_size=config.data.batch_size,
        num_shards=config.elastic.shards,
        shards=shards,
        timesteps=TIMESTEP_SAMPLERS[config.loss.timestep_sampler](config.diffusion.num_timesteps),
        flip=config.data.flip,
    )

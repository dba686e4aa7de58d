"""Builds the parts of a run from its config. Only this module looks up the names of a config in the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddpm_dist.config import Config, named_parts, width_of
from ddpm_dist.data.batches import StepBatches
from ddpm_dist.data.images import Images
from ddpm_dist.diffusion.losses import LOSSES, Autocast, DenoisingLoss, HybridLoss, VariationalLoss
from ddpm_dist.diffusion.predictions import PREDICTIONS, Prediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS
from ddpm_dist.diffusion.schedules import SCHEDULES
from ddpm_dist.diffusion.timesteps import TIMESTEP_SAMPLERS
from ddpm_dist.diffusion.variance import VARIANCES, Variance
from ddpm_dist.errors import ConfigError
from ddpm_dist.models.averages import EMA, Average, PowerEMA
from ddpm_dist.models.networks import NETWORKS
from ddpm_dist.randomness import derive_seed

TABLES: dict[str, Mapping[str, Any]] = {
    "diffusion.schedule": SCHEDULES,
    "diffusion.prediction": PREDICTIONS,
    "diffusion.variance": VARIANCES,
    "loss.weighting": LOSSES,
    "loss.timestep_sampler": TIMESTEP_SAMPLERS,
    "model.name": NETWORKS,
    "preview.sampler": SAMPLERS,
}
"""The table in which the value of each such key is looked up."""


def check_names(config: Config) -> None:
    """Check that each name of the config stands in its table, and that the chosen network accepts the model section.

    Raises:
        ConfigError: the message says the key, the value and what would be valid.
    """
    for key, name in named_parts(config).items():
        if name not in TABLES[key]:
            raise ConfigError(f"{key}={name}: expected one of {', '.join(TABLES[key])}")
    try:
        NETWORKS[config.model.name].check(config.model)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def size_divisor(config: Config) -> int:
    """The number of which height and width of the images must be multiples, for the chosen network."""
    return NETWORKS[config.model.name].size_divisor


def build_process(config: Config, device: torch.device) -> GaussianDiffusion:
    """Build the forward process of the config's schedule, with its tables on the device."""
    diffusion = config.diffusion
    betas = SCHEDULES[diffusion.schedule](diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end)
    return GaussianDiffusion(betas, device, zero_terminal_snr=diffusion.zero_terminal_snr)


def build_prediction(config: Config, process: GaussianDiffusion) -> Prediction:
    """Build the config's prediction: what the output of the network means."""
    return PREDICTIONS[config.diffusion.prediction](process)


def build_variance(config: Config, process: GaussianDiffusion) -> Variance:
    """Build the config's variance of the reverse steps; the network has its `num_parts` times the images' channels."""
    return VARIANCES[config.diffusion.variance](process)


def build_loss(config: Config, process: GaussianDiffusion, autocast: Autocast) -> DenoisingLoss:
    """Build the config's training loss. If the network learns its variance, the loss teaches that too.

    Args:
        process: the forward process, on the device of the batches.
        autocast: makes the context in which the network's forward pass runs.
    """
    prediction, variance = build_prediction(config, process), build_variance(config, process)
    loss = LOSSES[config.loss.weighting](process, prediction, autocast, config.loss.min_snr_gamma, variance)
    if variance.num_parts == 1 or loss.trains_variance:
        return loss
    return HybridLoss(loss, VariationalLoss(process, prediction, autocast, variance=variance), config.loss.vlb_weight)


def build_model(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    channels_last: bool,
) -> nn.Module:
    """Build the network with the weights of step 0, which are the same on every rank.

    It seeds torch's global generators.

    Args:
        image_shape: (C, H, W).
        num_classes: number of classes of the labels; 0 without labels.
        device: where the weights go.
        channels_last: whether the weights lie in the NHWC memory format.
    """
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    out_channels = image_shape[0] * VARIANCES[config.diffusion.variance].num_parts
    model = NETWORKS[config.model.name].build(config.model, image_shape, num_classes, out_channels).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def build_averages(config: Config, model: nn.Module) -> dict[str, Average]:
    """Build the averages of the weights, by name: `ema`, ones like `ema-0.999`, and ones like `power-0.05`.

    Previews and samples are drawn from `ema`, unless another one is asked for.
    """
    return {
        name: (EMA if width_of(name) is None else PowerEMA)(model, number) for name, number in config.averages().items()
    }


def build_batches(config: Config, shards: range, images: Images) -> StepBatches:
    """Build this rank's part of each step's batch.

    Args:
        shards: the logical shards that this rank computes.
        images: the data set.
    """
    return StepBatches(
        images,
        seed=config.run.seed,
        batch_size=config.data.batch_size,
        num_shards=config.elastic.shards,
        shards=shards,
        timesteps=TIMESTEP_SAMPLERS[config.loss.timestep_sampler](config.diffusion.num_timesteps),
        flip=config.data.flip,
        label_dropout=config.model.label_dropout,
    )

"""Builds the parts of a run from its config. Only this module looks up the names of a config in the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.config import Config, averages_of, named_parts, width_of
from ddpm_dist.data.batches import StepBatches, blank
from ddpm_dist.data.images import Images
from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.guidance import Guided
from ddpm_dist.diffusion.losses import LOSSES, Autocast, DenoisingLoss, HybridLoss, VariationalLoss
from ddpm_dist.diffusion.predictions import PREDICTIONS, Prediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS, Sampler, SamplerOptions, find_sampler
from ddpm_dist.diffusion.schedules import SCHEDULES
from ddpm_dist.diffusion.timesteps import TIMESTEP_SAMPLERS
from ddpm_dist.diffusion.variance import VARIANCES, Variance
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.models.averages import EMA, Average, PowerEMA
from ddpm_dist.models.networks import NETWORKS, Network, find_network
from ddpm_dist.models.own import NotUsable, check_promises
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

    The sampler of the previews is left to `build_preview_sampler`: images can be drawn without it.

    Raises:
        ConfigError: the message says the key, the value and what would be valid.
    """
    for key, name in named_parts(config).items():
        if key not in ("model.name", "preview.sampler") and name not in TABLES[key]:
            raise ConfigError(f"{key}={name}: expected one of {', '.join(TABLES[key])}")
    try:
        network, options = _network(config)
        network.check(options)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _network(config: Config) -> tuple[Network, Any]:
    """The chosen network, and the section of the config that has its keys. Raises ValueError."""
    network = find_network(config.model.name)
    return network, getattr(config, network.section)


def size_divisor(config: Config) -> int:
    """The number of which height and width of the images must be multiples, for the chosen network."""
    network, options = _network(config)
    return network.size_divisor(options)


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


def build_denoiser(
    config: Config,
    network: Callable[..., Tensor],
    num_classes: int,
    process: GaussianDiffusion,
    *,
    clip: bool,
    guidance: float = 1.0,
    interval: Sequence[int] | None = None,
    dynamic_threshold: float | None = None,
) -> Denoiser:
    """Build a denoiser for samplers: (x_t, t) -> Denoised. If the network has labels, its `cond` is still to be given.

    Args:
        network: in evaluation mode.
        num_classes: number of classes that the network is told of; 0 without labels.
        process: the forward process, with its tables on the network's device.
        clip: whether x_start is clipped to [-1, 1] at each step.
        guidance: how far from unconditional images those of a class are; see `Guided`. 1 without labels.
        interval: the first and the last timestep that are guided; None for all timesteps.
        dynamic_threshold: quantile of dynamic thresholding, which then takes the place of clip.
    """
    return Denoiser(
        Guided(network, num_classes, guidance, interval) if num_classes else network,
        process,
        build_prediction(config, process),
        clip,
        variance=build_variance(config, process),
        dynamic_threshold=dynamic_threshold,
    )


def build_preview_sampler(config: Config, process: GaussianDiffusion) -> tuple[Sampler, SamplerOptions]:
    """Build the sampler of the previews, and its options.

    Args:
        process: the forward process.

    Raises:
        ConfigError: there is no such sampler, or it cannot do what the keys say; the message says what would be valid.
    """
    preview = config.preview
    options = SamplerOptions(
        steps=preview.steps,
        spacing=preview.spacing,
        eta=preview.eta,
        variance=preview.variance,
        clip=preview.clip,
        dynamic_threshold=preview.dynamic_threshold,
    )

    def spelled(name: str, value: object) -> str:
        return f"preview.{name}={str(value).lower() if isinstance(value, bool) else value}"

    try:
        sampler = find_sampler(preview.sampler)
    except ValueError as error:
        raise ConfigError(spelled("sampler", error)) from None
    try:
        return sampler, sampler.settle(preview.sampler, options, process, spelled, config.diffusion.variance)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_previews(config: Config) -> None:
    """Check the sampler of the previews, if there are any. Raises ConfigError; see `build_preview_sampler`."""
    if config.preview.num_images:
        build_preview_sampler(config, build_process(config, torch.device("cpu")))


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
    model = _new_network(config, image_shape, num_classes).to(device)
    if config.train.gradient_checkpointing:
        _enable_gradient_checkpointing(model, config.model.name)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _out_channels(config: Config, image_shape: tuple[int, int, int]) -> int:
    """The number of channels of the network's output."""
    return image_shape[0] * VARIANCES[config.diffusion.variance].num_parts


def _new_network(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Raises ConfigError for a network of the user's own that cannot be used."""
    try:
        network, options = _network(config)
        return network.build(options, image_shape, num_classes, _out_channels(config, image_shape))
    except NotUsable as error:
        raise ConfigError(str(error)) from error


def _enable_gradient_checkpointing(model: nn.Module, name: str) -> None:
    enable = getattr(model, "enable_gradient_checkpointing", None)
    if not callable(enable):
        raise ConfigError(
            f"train.gradient_checkpointing=true: model.name={name} has no method enable_gradient_checkpointing()"
        )
    enable()


def check_own_network(
    config: Config,
    images: Images,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """If the network is one of the user's own, check that it keeps its promises, with a batch of two images.

    The networks of the package are checked by its tests. Nothing is drawn from torch's global generators.

    Args:
        images: only their shape and their conditions are used.
        weights: those of the checkpoint that the run goes on from; None for a new run.

    Raises:
        ConfigError: a promise is broken.
        DataError: the network is not the one that the weights are of.
    """
    if ":" not in config.model.name:
        return
    batch = blank(images, 2)
    try:
        ours = check_promises(
            config.model.name,
            lambda: _new_network(config, images.shape, images.num_classes).to(device),
            batch.noise.to(device),
            batch.t.to(device),
            {name: value.to(device) for name, value in batch.cond.items()},
            _out_channels(config, images.shape),
        )
    except NotUsable as error:
        raise ConfigError(str(error)) from error
    if weights is not None:
        check_weights_fit(config, ours, weights)


def check_weights_fit(config: Config, ours: Mapping[str, list[int]], weights: Mapping[str, Tensor]) -> None:
    """Check that weights are those of this network, and not of another one, such as this one with other code.

    Args:
        ours: the shape of each weight of the network, by name.

    Raises:
        DataError: they are not; the message names the first one that differs.
    """
    theirs = {name: list(value.shape) for name, value in weights.items()}
    if ours != theirs:
        weight = next(each for each in {**ours, **theirs} if ours.get(each) != theirs.get(each))
        raise DataError(
            f"model.name={config.model.name}: builds another network than the one that was trained ({weight}: "
            f"{theirs.get(weight, 'not there')} -> {ours.get(weight, 'not there')}); use the code of step 0"
        )


def build_averages(config: Config, model: nn.Module) -> dict[str, Average]:
    """Build the averages of the weights, by name: `ema`, ones like `ema-0.999`, and ones like `power-0.05`.

    Previews and samples are drawn from `ema`, unless another one is asked for.
    """
    return {
        name: (EMA if width_of(name) is None else PowerEMA)(model, number)
        for name, number in averages_of(config).items()
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

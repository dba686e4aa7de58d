"""Rules that involve several keys, or keys and the number of ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ddpm_dist.config.averages import averages_of
from ddpm_dist.config.flat import keys, to_flat
from ddpm_dist.config.schema import Config, OptimConfig
from ddpm_dist.config.unet2d import check_unet2d
from ddpm_dist.errors import ConfigError


def check_together(config: Config) -> None:
    """Check the rules that the type and the bounds of a single key cannot express.

    Raises:
        ConfigError: the message names the keys and what would be valid.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]{0,199}", config.run.name):
        raise ConfigError(
            f"run.name={config.run.name}: expected one directory name of letters, digits and _.=,+- "
            "that starts with a letter, a digit or _ (no /, no ..)"
        )
    data, shards = config.data, config.elastic.shards
    if data.batch_size % shards:
        near = sorted({max(1, data.batch_size // shards) * shards, (data.batch_size // shards + 1) * shards})
        raise ConfigError(
            f"data.batch_size={data.batch_size}: must be a multiple of elastic.shards={shards}; "
            f"valid nearby: {', '.join(map(str, near))}"
        )
    if config.elastic.mode == "bitwise" and config.train.micro_batch_size is not None:
        raise ConfigError(
            f"train.micro_batch_size={config.train.micro_batch_size}: must be null with elastic.mode=bitwise, where "
            f"each forward is one shard, here of {data.batch_size // shards} images; set more elastic.shards"
            " for a smaller one"
        )
    if data.name == "folder" and data.image_size is None:
        raise ConfigError("data.image_size=null: data.name=folder needs a multiple of 4, like 64")
    divisor = _size_divisor(config)
    if data.image_size is not None and data.image_size % divisor:
        smaller = data.image_size // divisor * divisor
        valid = ", ".join(str(size) for size in (smaller, smaller + divisor) if size)
        raise ConfigError(f"data.image_size={data.image_size}: must be a multiple of {divisor}; valid nearby: {valid}")
    _check_network(config)
    _check_diffusion(config)
    _check_averages(config)
    _check_labels(config)
    _check_init(config)
    if config.optim.name == "adam" and config.optim.weight_decay:
        # torch's Adam would add it to the gradient and then divide it by the gradient's size (arXiv:1711.05101).
        raise ConfigError(
            f"optim.weight_decay={config.optim.weight_decay}: must be 0 with optim.name=adam, which would scale the "
            "decay of each weight by its gradients; set optim.name=adamw"
        )
    # Without either of these keys, the end of the cosine depends on the number of images, which is not known yet.
    known = config.optim.decay_steps or config.train.max_steps
    if known is not None:
        cosine_end(config.optim, known)


def _size_divisor(config: Config) -> int:
    """The number of which the size of the images must be a multiple, as far as that is known without the network."""
    return config.unet2d.size_divisor if config.model.name == "unet2d" else 4


def _check_network(config: Config) -> None:
    """Check the keys of the network, and that no key is set which the chosen network does not look at."""
    model = config.model
    if model.name == "unet" and model.channels % 8:
        raise ConfigError(f"model.channels={model.channels}: must be a multiple of 8 (GroupNorm has 8 groups)")
    if model.name == "unet" and model.time_embed_dim % 2:
        raise ConfigError(f"model.time_embed_dim={model.time_embed_dim}: must be even")
    if model.options and ":" not in model.name:
        raise ConfigError(
            f"model.options=[{', '.join(model.options)}]: model.name={model.name} takes none; they are for a network "
            "of your own, model.name=package.module:function"
        )
    if model.name == "unet2d":
        check_unet2d(config.unet2d)
        _refuse_unused(config, ("model.channels", "model.time_embed_dim", "model.dropout"), "the keys unet2d.*")
    if model.name == "unet":
        _refuse_unused(config, [name for name in keys() if name.startswith("unet2d.")], "model.name=unet2d")


def _refuse_unused(config: Config, names: Iterable[str], instead: str) -> None:
    """Refuse a key that differs from its default although the chosen network does not look at it."""
    given, default = to_flat(config), to_flat(Config())
    for name in names:
        if given[name] != default[name]:
            raise ConfigError(f"{name}={given[name]}: model.name={config.model.name} does not use it; set {instead}")


def _check_diffusion(config: Config) -> None:
    """Check the rules about the schedule, what the network predicts, and the timesteps that are visited."""
    if config.diffusion.beta_start > config.diffusion.beta_end:
        raise ConfigError(
            f"diffusion.beta_start={config.diffusion.beta_start}: must not be above "
            f"diffusion.beta_end={config.diffusion.beta_end}"
        )
    if config.diffusion.zero_terminal_snr and config.diffusion.prediction == "eps":
        raise ConfigError(
            "diffusion.zero_terminal_snr=true: not with diffusion.prediction=eps, since the noise of the last timestep "
            "says nothing about the image; valid: v, x0"
        )
    if config.preview.num_images and (config.preview.steps or 1) > config.diffusion.num_timesteps:
        raise ConfigError(
            f"preview.steps={config.preview.steps}: at most diffusion.num_timesteps={config.diffusion.num_timesteps}"
        )


def _check_averages(config: Config) -> None:
    """Check that each average has a name of its own, and that previews are drawn from one of them."""
    for name, numbers in (("ema.more", config.ema.more), ("ema.widths", config.ema.widths)):
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"{name}={list(numbers)}: each number may stand there once")
    if config.checkpoint.ema_snapshots and not config.ema.widths:
        raise ConfigError("ema.widths=[]: checkpoint.ema_snapshots needs the widths to keep, like [0.05, 0.1]")
    if config.preview.weights not in averages_of(config):
        valid = ", ".join(averages_of(config))
        raise ConfigError(
            f"preview.weights={config.preview.weights}: this run keeps no such average; it keeps {valid} "
            "(see ema.more and checkpoint.ema_snapshots)"
        )


def _check_labels(config: Config) -> None:
    """Check the rules about labels and guidance."""
    guidance, interval = config.preview.guidance, config.preview.guidance_interval
    last = config.diffusion.num_timesteps - 1
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= last):
        raise ConfigError(
            f"preview.guidance_interval={list(interval)}: expected null or the first and the last timestep that are "
            f"guided, in 0 to {last}"
        )
    if guidance != 1 and not config.model.class_labels:
        raise ConfigError(f"preview.guidance={guidance}: must be 1 without labels; or set model.class_labels=true")
    if guidance != 1 and not config.model.label_dropout:
        raise ConfigError(
            f"preview.guidance={guidance}: must be 1 with model.label_dropout=0, since the network never learns what "
            "an image of no class in particular is; set model.label_dropout=0.1"
        )


def _check_init(config: Config) -> None:
    """Check that a new run starts from one thing."""
    if config.init.weights is not None and config.init.run is not None:
        raise ConfigError(
            f"init.weights={config.init.weights}: not together with init.run={config.init.run}, which brings weights; "
            "give one of them"
        )


def cosine_end(optim: OptimConfig, target: int) -> int | None:
    """The step at which the cosine reaches 0; None for a constant learning rate.

    Args:
        target: the step at which the run is finished.

    Raises:
        ConfigError: the cosine would end before the warm-up does.
    """
    if optim.schedule != "cosine":
        return None
    end = optim.decay_steps or target
    if end <= optim.warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps={optim.warmup_steps}: must be below the step at which the cosine ends, {end}"
        )
    return end


def check_world_size(config: Config, world_size: int) -> None:
    """Check that this number of ranks divides the logical shards, and that micro-batches divide the images of a rank.

    Args:
        world_size: the number of ranks.

    Raises:
        ConfigError: the message lists the numbers of ranks, or the sizes of a micro-batch, that would be valid.
    """
    shards, bitwise = config.elastic.shards, config.elastic.mode == "bitwise"
    valid_sizes = [n for n in range(1, shards + 1) if shards % n == 0 and not (bitwise and n & (n - 1))]
    if world_size not in valid_sizes:
        sizes = ", ".join(map(str, valid_sizes))
        how = "in a binary tree (elastic.mode=bitwise)" if bitwise else "evenly"
        raise ConfigError(
            f"{world_size} ranks cannot share elastic.shards={shards} {how}; valid numbers of ranks: "
            f"{sizes} (set elastic.shards to the largest number you plan, before the run starts)"
        )
    per_rank, micro = config.data.batch_size // world_size, config.train.micro_batch_size
    if micro is not None and micro < per_rank and per_rank % micro:
        valid = [str(n) for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise ConfigError(
            f"train.micro_batch_size={micro}: must divide the {per_rank} images of a rank "
            f"(data.batch_size={config.data.batch_size} over {world_size}); valid: {', '.join(valid)}"
        )

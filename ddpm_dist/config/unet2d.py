"""The keys of UNet2DModel of diffusers, and what is valid for them. Nothing here imports diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddpm_dist.config.declaration import key
from ddpm_dist.errors import ConfigError

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


@dataclass(frozen=True)
class UNet2DConfig:
    """UNet2DModel of diffusers, for model.name=unet2d. Each key but zero_init has its name and its default there."""

    block_out_channels: tuple[int, ...] = key(
        (224, 448, 672, 896), "width at each resolution, the full one first; each next one is half as high", minimum=4
    )
    down_block_types: tuple[str, ...] = key(
        ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        f"block at each resolution on the way down: {', '.join(DOWN_BLOCKS)}",
    )
    up_block_types: tuple[str, ...] = key(
        ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        f"block at each resolution on the way up, the lowest first: {', '.join(UP_BLOCKS)}",
    )
    layers_per_block: int = key(2, "residual blocks at each resolution; one more on the way up", minimum=1)
    attention_head_dim: int | None = key(8, "channels of an attention head (null: one head of all channels)", minimum=1)
    add_attention: bool = key(True, "attention in the middle, at the lowest resolution")
    norm_num_groups: int = key(32, "groups of each GroupNorm; it must divide each width", minimum=1)
    attn_norm_num_groups: int | None = key(
        None,
        "groups of the norm before the attention in the middle "
        "(null: norm_num_groups, and no norm with resnet_time_scale_shift=scale_shift)",
        minimum=1,
    )
    norm_eps: float = key(1e-5, "added to the variance in each GroupNorm", above=0.0)
    act_fn: Literal["silu", "gelu", "relu", "mish"] = key("silu", "the activation")
    dropout: float = key(0.0, "dropout inside each residual block", minimum=0.0, below=1.0)
    time_embedding_dim: int | None = key(
        None, "width of the time embedding (null: four times the first width)", minimum=1
    )
    flip_sin_to_cos: bool = key(True, "time embedding: cosines first, then sines")
    freq_shift: int = key(0, "time embedding: the frequencies are 10000^(-i / (half - this)), i = 0, 1 ..", minimum=0)
    resnet_time_scale_shift: Literal["default", "scale_shift"] = key(
        "default", "what the time embedding does in a residual block; scale_shift: it scales too"
    )
    mid_block_scale_factor: float = key(1.0, "the output of each part of the middle is divided by this", above=0.0)
    downsample_type: Literal["conv", "resnet"] = key("conv", "how the blocks with attention halve height and width")
    downsample_padding: int = key(1, "padding where a convolution halves; 0 pads below and right alone", minimum=0)
    upsample_type: Literal["conv", "resnet"] = key("conv", "how the blocks with attention double height and width")
    zero_init: bool = key(
        True, "the last convolution of each residual block, of each attention and of the network starts at zero"
    )

    @property
    def size_divisor(self) -> int:
        """Height and width of the images must be multiples of this, since they are halved so often."""
        return int(2 ** (len(self.block_out_channels) - 1))


def check_unet2d(unet2d: UNet2DConfig) -> None:
    """Check the rules that bind several keys of the section.

    Raises:
        ConfigError: the message names the key and what would be valid.
    """
    widths, groups = unet2d.block_out_channels, unet2d.norm_num_groups
    if not widths:
        raise ConfigError("unet2d.block_out_channels=[]: expected one width for each resolution, like [128, 256, 256]")
    for name, given, valid in (
        ("down_block_types", unet2d.down_block_types, DOWN_BLOCKS),
        ("up_block_types", unet2d.up_block_types, UP_BLOCKS),
    ):
        shown = f"unet2d.{name}={_shown(given)}"
        wrong = next((number for number, each in enumerate(given, start=1) if each not in valid), None)
        if wrong is not None:
            raise ConfigError(f"{shown}: element {wrong} is {given[wrong - 1]!r}; expected one of {', '.join(valid)}")
        if len(given) != len(widths):
            raise ConfigError(
                f"{shown}: must be as long as unet2d.block_out_channels={_shown(widths)}: one block for each width"
            )
    for width in widths:
        if width % groups:
            raise ConfigError(
                f"unet2d.block_out_channels={_shown(widths)}: {width} must be a multiple of "
                f"unet2d.norm_num_groups={groups}; valid nearby: {_nearby(width, groups)}"
            )
    if unet2d.attn_norm_num_groups is not None and widths[-1] % unet2d.attn_norm_num_groups:
        raise ConfigError(
            f"unet2d.attn_norm_num_groups={unet2d.attn_norm_num_groups}: must divide {widths[-1]}, the last width of "
            "unet2d.block_out_channels"
        )
    if unet2d.downsample_padding > 1:
        raise ConfigError(f"unet2d.downsample_padding={unet2d.downsample_padding}: must be 0 or 1")
    if widths[0] // 2 <= unet2d.freq_shift:
        raise ConfigError(
            f"unet2d.freq_shift={unet2d.freq_shift}: must be below half of {widths[0]}, the first width of "
            "unet2d.block_out_channels"
        )
    _check_heads(unet2d)


def _check_heads(unet2d: UNet2DConfig) -> None:
    """Refuse a width of an attention that its heads cannot share."""
    head, widths = unet2d.attention_head_dim, unet2d.block_out_channels
    blocks = zip(widths, unet2d.down_block_types, reversed(unet2d.up_block_types), strict=True)
    attended = [width for width, *types in blocks if any(each.startswith("Attn") for each in types)]
    for width in (*attended, *(widths[-1:] if unet2d.add_attention else ())):
        if head is not None and width % head:
            raise ConfigError(
                f"unet2d.attention_head_dim={head}: must divide {width}, a width of unet2d.block_out_channels that has "
                "attention; null is one head of all channels"
            )


def _shown(values: tuple[object, ...]) -> str:
    return f"[{', '.join(map(str, values))}]"


def _nearby(value: int, divisor: int) -> str:
    smaller = value // divisor * divisor
    return ", ".join(str(each) for each in (smaller, smaller + divisor) if each)

"""UNet2DModel of diffusers as a network of this package, with the initialisation of Ho et al."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

KEYS = (
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "add_attention",
    "norm_num_groups",
    "attn_norm_num_groups",
    "norm_eps",
    "act_fn",
    "dropout",
    "time_embedding_dim",
    "flip_sin_to_cos",
    "freq_shift",
    "resnet_time_scale_shift",
    "mid_block_scale_factor",
    "downsample_type",
    "downsample_padding",
    "upsample_type",
)
"""The keys of the config section that UNet2DModel takes under the same names."""


class UNet2D(UNet2DModel):  # type: ignore[misc] # diffusers has no types
    """UNet2DModel with the forward of this package. Its weights have the names that they have in diffusers."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: float32 [B, C, H, W].
            t: int64 [B] in [0, T-1]; 0 is the least noisy.
            labels: int64 [B] in [0, num_classes], the last of which is the null label; for a network with labels.

        Returns:
            [B, out_channels, H, W], in float32 or in the autocast type.
        """
        output: Tensor = super().forward(x, t, class_labels=labels, return_dict=False)[0]
        return output


def build(options: Any, image_shape: tuple[int, int, int], num_classes: int, out_channels: int) -> nn.Module:
    """Build the network, with weights drawn from torch's global generator.

    Args:
        options: the section unet2d of the config.
        image_shape: (C, H, W).
        num_classes: 0 without labels; otherwise the embedding has one row more, for the null label.
        out_channels: C, or 2 C if the network learns its variance.
    """
    model = UNet2D(
        sample_size=image_shape[1] if image_shape[1] == image_shape[2] else image_shape[1:],
        in_channels=image_shape[0],
        out_channels=out_channels,
        num_class_embeds=num_classes + 1 if num_classes else None,
        **{name: getattr(options, name) for name in KEYS},
    )
    if options.zero_init:
        zero_last_layers(model)
    return model


@torch.no_grad()
def zero_last_layers(model: nn.Module) -> None:
    """Set to zero what is added to a shortcut, and the last convolution, so that the network starts simple.

    Ho et al. 2020 do so in their code (hojonathanho/diffusion, models/unet.py, init_scale=0), and Nichol & Dhariwal
    2021 in theirs (zero_module); diffusers does not.
    """
    last = [module.conv2 for module in model.modules() if isinstance(module, ResnetBlock2D)]
    last += [module.to_out[0] for module in model.modules() if isinstance(module, Attention)]
    for layer in (*last, model.conv_out):
        layer.weight.zero_()
        layer.bias.zero_()


def check(options: Any) -> None:
    """See whether diffusers builds such a network and runs it, on the meta device, where it takes no memory.

    Raises:
        ValueError: it does not; the message is that of diffusers.
    """
    size = options.size_divisor
    try:
        with torch.device("meta"):
            model = build(options, (3, size, size), 0, 3)
            model(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long))
    except Exception as error:  # diffusers and torch raise what they like for a combination that they do not support
        raise ValueError(f"unet2d: diffusers refuses this network ({type(error).__name__}: {error})") from None

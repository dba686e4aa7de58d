"""The table of networks.

To add a network: write it in a file of its own, and enter it in NETWORKS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddpm_dist.models.unet import SIZE_DIVISOR, UNet


def _build_unet(options: Any, image_shape: tuple[int, int, int], num_classes: int, out_channels: int) -> nn.Module:
    return UNet(image_shape[0], options.channels, options.time_embed_dim, options.dropout, out_channels, num_classes)


def _accept(options: Any) -> None:
    """Accept everything. The rules of the reference U-Net are in config/checks.py, where they need no torch."""


@dataclass(frozen=True)
class Network:
    """How a network is made.

    Its forward is (x_t float32 [B, C, H, W], t int64 [B], **cond) -> [B, out_channels, H, W]. If it was built with
    classes, cond is `labels`, int64 [B] in [0, num_classes]; the last is the null label, which stands for no class in
    particular. Every weight must get a gradient from every batch: DistributedDataParallel would wait for ever for one
    that is missing.

    Attributes:
        build: (model section of the config, (C, H, W), number of classes or 0, out_channels) -> the network.
            out_channels is C, or 2 C if the network learns its variance. It draws its weights from torch's global
            generator.
        size_divisor: height and width of the images must be multiples of this.
        check: takes the model section, and raises a ValueError that names the key if a value cannot work.
    """

    build: Callable[[Any, tuple[int, int, int], int, int], nn.Module]
    size_divisor: int = 1
    check: Callable[[Any], None] = _accept


NETWORKS: dict[str, Network] = {"unet": Network(_build_unet, SIZE_DIVISOR)}
"""The networks by the name that model.name gives them."""

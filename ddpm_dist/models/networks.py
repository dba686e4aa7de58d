"""The table of networks.

To add a network: write it in a file of its own, and enter it in NETWORKS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddpm_dist.models.unet import SIZE_DIVISOR, UNet


def _build_unet(options: Any, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return UNet(image_shape[0], options.channels, options.time_embed_dim, options.dropout)


def _accept(options: Any) -> None:
    """The rules of the reference U-Net's keys are those of the config itself, so that they need no torch."""


@dataclass(frozen=True)
class Network:
    """How a network is made.

    Its forward is (x_t float32 [B, C, H, W], t int64 [B], **cond) -> [B, C, H, W]. Every weight must get a gradient
    from every batch: DistributedDataParallel would wait for the missing ones for ever.

    Attributes:
        build: (model section of the config, (C, H, W), number of classes, 0 for none) -> the network with fresh
            weights, drawn from the global generator.
        size_divisor: height and width of the images must be multiples of it.
        check: raises ValueError, with the name of the key, where the section's values cannot work.
    """

    build: Callable[[Any, tuple[int, int, int], int], nn.Module]
    size_divisor: int = 1
    check: Callable[[Any], None] = _accept


NETWORKS: dict[str, Network] = {"unet": Network(_build_unet, SIZE_DIVISOR)}

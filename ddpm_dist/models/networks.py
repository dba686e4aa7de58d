"""The table of networks.

To add a network: write it in a file of its own, and enter it in NETWORKS.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddpm_dist.models.own import import_build
from ddpm_dist.models.unet import SIZE_DIVISOR, UNet


@dataclass(frozen=True)
class Network:
    """How a network is made.

    Its forward is (x_t float32 [B, C, H, W], t int64 [B], **cond) -> [B, out_channels, H, W]. If it was built with
    classes, cond is `labels`, int64 [B] in [0, num_classes]; the last is the null label, which stands for no class in
    particular. Every weight must get a gradient from every batch: DistributedDataParallel would wait for ever for one
    that is missing. A network that can compute its blocks again instead of keeping them has a method
    `enable_gradient_checkpointing()`.

    Attributes:
        build: (section of the config, (C, H, W), number of classes or 0, out_channels) -> the network.
            out_channels is C, or 2 C if the network learns its variance. It draws its weights from torch's global
            generator.
        size_divisor: takes the section; height and width of the images must be multiples of what it returns.
        check: takes the section, and raises a ValueError that names the key if a value cannot work.
        section: the section of the config that has the network's keys.
    """

    build: Callable[[Any, tuple[int, int, int], int, int], nn.Module]
    size_divisor: Callable[[Any], int] = lambda options: 1
    check: Callable[[Any], None] = lambda options: None
    section: str = "model"


def _build_unet(options: Any, image_shape: tuple[int, int, int], num_classes: int, out_channels: int) -> nn.Module:
    return UNet(image_shape[0], options.channels, options.time_embed_dim, options.dropout, out_channels, num_classes)


def _build_unet2d(options: Any, image_shape: tuple[int, int, int], num_classes: int, out_channels: int) -> nn.Module:
    from ddpm_dist.models.unet2d import build  # diffusers is an optional extra, and takes seconds to import

    return build(options, image_shape, num_classes, out_channels)


def _check_unet2d(options: Any) -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("model.name=unet2d: needs diffusers; pip install 'ddpm_dist[diffusers]'")
    from ddpm_dist.models.unet2d import check

    check(options)


# The rules of the keys of both are in config/, where they need no torch.
NETWORKS: dict[str, Network] = {
    "unet": Network(_build_unet, lambda options: SIZE_DIVISOR),
    "unet2d": Network(_build_unet2d, lambda options: int(options.size_divisor), _check_unet2d, "unet2d"),
}
"""The networks by the name that model.name gives them."""


def find_network(name: str) -> Network:
    """The network of this name: one of NETWORKS, or for `package.module:function` the user's own.

    Raises:
        ValueError: there is no such network; the message says what would be valid.
    """
    if ":" in name:
        return Network(import_build(name))
    if name not in NETWORKS:
        raise ValueError(f"model.name={name}: expected one of {', '.join(NETWORKS)}, or package.module:function")
    return NETWORKS[name]

"""A network other than the reference one, for tests of what must hold for any network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from harness import call_train
from torch import Tensor, nn

from ddpm_dist.models.unet import ResBlock, UNet


class Attentive(nn.Module):
    """A residual block, followed by self-attention over all pixels (Ho et al. 2020, appendix B)."""

    def __init__(self, block: ResBlock, channels: int, num_heads: int = 4) -> None:
        super().__init__()
        self.block, self.num_heads = block, num_heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        x = self.block(x, time_embedding)
        size, channels, height, width = x.shape
        flat = self.norm(x).flatten(2).transpose(1, 2)
        heads = self.qkv(flat).view(size, height * width, 3, self.num_heads, channels // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(flat.shape)
        result: Tensor = x + self.out(mixed).transpose(1, 2).reshape(x.shape)
        return result


class AttentiveUNet(UNet):
    """The reference network with self-attention after its middle block."""

    def __init__(self, image_channels: int, channels: int, time_embed_dim: int, dropout: float) -> None:
        super().__init__(image_channels, channels, time_embed_dim, dropout)
        self.mid: Any = Attentive(self.mid, 4 * channels)


def call_train_attentive(argv: Sequence[str]) -> int:
    """The train command with model.name=attentive, the network above."""
    from ddpm_dist.models.networks import NETWORKS, Network

    NETWORKS["attentive"] = Network(
        lambda model, image_shape, num_classes, out_channels: AttentiveUNet(
            image_shape[0], model.channels, model.time_embed_dim, model.dropout
        ),
        size_divisor=lambda model: 4,
    )
    return call_train([*argv, "model.name=attentive"])

"""The reference U-Net: three resolutions, residual blocks of convolution, GroupNorm(8) and SiLU, concatenated skips."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_GROUPS = 8
SIZE_DIVISOR = 4  # height and width are halved twice


class SinusoidalTimeEmbedding(nn.Module):
    """[sin(t ω_i), cos(t ω_i)] with ω_i = 10000^(-i / (half - 1)), i = 0 .. half - 1.

    Vaswani et al. 2017, section 3.5 (arXiv:1706.03762), with half - 1 in the exponent as in DDPM's own code.

    Args:
        dim: width of the embedding, even; half = dim / 2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - 1))
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed the timesteps: t int64 [B] -> float32 [B, dim] in [-1, 1]."""
        angles = t[:, None].float() * self.frequencies[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResBlock(nn.Module):
    """x + block(x), where the block is twice conv-norm-SiLU, with a shift between them that depends on the timestep.

    Args:
        in_channels, out_channels: if they differ, a 1x1 convolution takes x to out_channels.
        time_embed_dim: width of the time embedding.
        dropout: in [0, 1), before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, time_embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.time_proj = nn.Linear(time_embed_dim, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.keeps_activations = True

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """x [B, in_channels, H, W], time_embedding [B, time_embed_dim] -> [B, out_channels, H, W]."""
        if self.keeps_activations or not torch.is_grad_enabled():
            return self._compute(x, time_embedding)
        output: Tensor = checkpoint(self._compute, x, time_embedding, use_reentrant=False, preserve_rng_state=True)
        return output

    def _compute(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        h = h + self.time_proj(F.silu(time_embedding))[:, :, None, None]
        h = F.silu(self.norm2(self.conv2(self.dropout(h))))
        shortcut: Tensor = self.skip(x)
        return h + shortcut


class UNet(nn.Module):
    """Maps x_t and t to a tensor of x_t's height and width, which the reference recipe takes for the noise in x_t.

    Args:
        image_channels: C of the images.
        channels: width at full resolution, a multiple of 8. At half resolution the width is twice that, at a quarter
            four times.
        time_embed_dim: width of the time embedding, even.
        dropout: in [0, 1), inside each residual block; the reference recipe has none.
        out_channels: of the output; None for as many as the images have.
        num_classes: number of classes of the labels; 0 for a network without labels.
    """

    def __init__(
        self,
        image_channels: int = 1,
        channels: int = 64,
        time_embed_dim: int = 128,
        dropout: float = 0.0,
        out_channels: int | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(
            SinusoidalTimeEmbedding(time_embed_dim),
            nn.Linear(time_embed_dim, time_embed_dim),
            nn.SiLU(),
            nn.Linear(time_embed_dim, time_embed_dim),
        )

        def block(in_width: int, out_width: int) -> ResBlock:
            return ResBlock(in_width * channels, out_width * channels, time_embed_dim, dropout)

        self.in_conv = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.down1, self.down2, self.down3 = block(1, 1), block(1, 2), block(2, 4)
        self.mid = block(4, 4)
        self.up3, self.up2, self.up1 = block(8, 2), block(4, 1), block(2, 1)
        self.out_conv = nn.Conv2d(channels, out_channels or image_channels, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        # A row for each class and one for the null label. It is drawn last, so that labels change no other weight.
        self.label_embedding = nn.Embedding(num_classes + 1, time_embed_dim) if num_classes else None

    def enable_gradient_checkpointing(self) -> None:
        """Have each residual block computed again for its gradient, instead of keeping what it needs for that.

        Chen et al. 2016 (arXiv:1604.06174). Dropout is drawn from the same state again, so the bits stay the same.
        """
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.keeps_activations = False

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: float32 [B, C, H, W], H and W multiples of 4.
            t: int64 [B] in [0, T-1]; 0 is the least noisy.
            labels: int64 [B] in [0, num_classes], the last of which is the null label; for a network with labels.

        Returns:
            [B, out_channels, H, W], in float32 or in the autocast type.
        """
        time = self.time_embedding(t)
        if self.label_embedding is not None:
            time = time + self.label_embedding(labels)
        h1 = self.down1(self.in_conv(x), time)
        h2 = self.down2(self.pool(h1), time)
        h3 = self.down3(self.pool(h2), time)
        h = self.mid(h3, time)
        h = self.up3(torch.cat([h, h3], dim=1), time)
        h = self.up2(torch.cat([self.upsample(h), h2], dim=1), time)
        h = self.up1(torch.cat([self.upsample(h), h1], dim=1), time)
        output: Tensor = self.out_conv(h)
        return output

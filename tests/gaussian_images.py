"""Images whose likelihood is known exactly, and the network that is best for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = np.arange(256) / 127.5 - 1
"""The values of a pixel, for the network."""


@dataclass(frozen=True)
class GaussianImages:
    """Pixels that are independent and normal, rounded to the 256 levels, and the network that knows all about them.

    Attributes:
        mean, sigma: before rounding; small enough for 0 and 255 to be as good as impossible.
    """

    mean: float = 0.05
    sigma: float = 0.15

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [256]."""
        edges = [
            math.erfc(-((2 * level - 1) / 255 - 1 - self.mean) / self.sigma / math.sqrt(2)) for level in range(257)
        ]
        return np.diff(np.array(edges) / 2)

    @property
    def bits(self) -> float:
        """The exact negative log-likelihood, in bits per dimension."""
        p = self.probabilities
        return float(-(p * np.log2(np.maximum(p, 1e-300))).sum())

    def moments(self) -> tuple[float, float]:
        """Mean and variance of the levels."""
        mean = float((self.probabilities * LEVELS).sum())
        return mean, float((self.probabilities * LEVELS**2).sum()) - mean**2

    def posterior(self, alphas_cumprod: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_0 given x_t. Float64."""
        mean, variance = self.moments()
        noise = (1 - alphas_cumprod) / alphas_cumprod
        left = 1 / (1 / variance + 1 / noise)
        return left * (mean / variance + x_t / alphas_cumprod.sqrt() / noise), left


class KnowsAll(nn.Module):
    """Says the mean and the best variance of x_{t-1}, in the words of a prediction and of the learned variance."""

    def __init__(self, images: GaussianImages, betas: Tensor, prediction: str, learned: bool) -> None:
        super().__init__()
        self.images, self.prediction, self.learned = images, prediction, learned
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        posterior = betas * (1 - before) / (1 - self.alphas_cumprod)
        low, high = torch.cat([posterior[1:2], posterior[1:]]).log(), betas.log()
        weight_of_start = before.sqrt() * betas / (1 - self.alphas_cumprod)
        _, left = images.posterior(self.alphas_cumprod, torch.zeros(1))
        best = posterior + weight_of_start**2 * left
        best[0] -= (2 / 255) ** 2 / 12  # the level's interval adds the variance of its width (Sheppard's correction)
        self.best, self.v = best, 2 * (best.log() - low) / (high - low) - 1

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        start, _ = self.images.posterior(bar, x.double())
        eps = (x.double() - bar.sqrt() * start) / (1 - bar).sqrt()
        said = {"x0": start, "eps": eps, "v": bar.sqrt() * eps - (1 - bar).sqrt() * start}[self.prediction]
        v = self.v[t].view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([said, v], dim=1).float() if self.learned else said.float()

"""Noise schedules: the variances β_1 .. β_T of the forward process, in float64.

To add a schedule: write a function that returns the betas, and enter it in SCHEDULES.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """The betas of all timesteps, the least noisy one first."""

    def __call__(self, num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
        """The betas.

        Args:
            num_timesteps: T.
            beta_start, beta_end: the first and the last beta, in (0, 1); a schedule may ignore them.

        Returns:
            float64 [T] in (0, 1).
        """


def linear_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances that grow linearly from beta_start to beta_end, both included.

    Ho et al. 2020, section 4 (arXiv:2006.11239): T = 1000, 1e-4 .. 0.02.

    Returns:
        float64 [T] in (0, 1).
    """
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances for which ᾱ_t falls as cos²((t/T + s) / (1 + s) · π/2), s = 0.008.

    Nichol & Dhariwal 2021, section 3.2, eq. 17 (arXiv:2102.09672). With the linear schedule, images of 32 pixels and
    fewer are nearly noise for a quarter of the timesteps, which then teach the network little. beta_start and beta_end
    are not used.

    Returns:
        float64 [T] in (0, 0.999]; cut off there, as in the paper, since the last ones would be singular.
    """
    offset = 0.008
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_cumprod = torch.cos((t + offset) / (1 + offset) * torch.pi / 2).square()
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Schedule] = {"linear": linear_betas, "cosine": cosine_betas}
"""The schedules by the name that diffusion.schedule gives them."""

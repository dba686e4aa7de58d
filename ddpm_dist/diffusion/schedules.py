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


def scaled_linear_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances whose square roots grow linearly from that of beta_start to that of beta_end, both included.

    Rombach et al. 2022 (arXiv:2112.10752), in the authors' code; latent diffusion uses it with 0.00085 .. 0.012.

    Returns:
        float64 [T] in (0, 1).
    """
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()


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
    return _betas_of(torch.cos((t + offset) / (1 + offset) * torch.pi / 2).square())


def sigmoid_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances for which ᾱ_t falls as σ(-(6 t/T - 3) / 0.9), moved and scaled to fall from 1 to 0.

    Jabri et al. 2022 (arXiv:2212.11972). The formula is algorithm 1 of Chen 2023 (arXiv:2301.10972); start, end and
    temperature are those of the authors' configs (google-research/pix2seq, config_diffusion_cifar10.py). Fewer
    timesteps than in the cosine schedule have hardly any noise, or hardly anything else. What diffusers calls "sigmoid"
    is another schedule, in which the betas have that shape. beta_start and beta_end are not used.

    Returns:
        float64 [T] in (0, 0.999]; cut off there, as those of the cosine schedule.
    """
    start, end, temperature = -3.0, 3.0, 0.9
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    curve = torch.sigmoid(-(start + t * (end - start)) / temperature)
    return _betas_of((curve - curve[-1]) / (curve[0] - curve[-1]))


def _betas_of(alphas_cumprod: Tensor) -> Tensor:
    """β_t = 1 - ᾱ_t / ᾱ_{t-1}, at most 0.999: float64 [T] from ᾱ at t = 0 .. T, of which the first is 1."""
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """The betas of a schedule whose sqrt(ᾱ_t) is moved and scaled so that it ends at 0 and starts where it did.

    Lin et al. 2024, algorithm 1 (arXiv:2305.08891). Then x_T is pure noise in training too, as it is when sampling.

    Args:
        betas: float64 [T] in (0, 1), T >= 2.

    Returns:
        float64 [T] in (0, 1], of which only the last is 1.
    """
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0], signal[-1]
    alphas_cumprod = ((signal - last) * (first / (first - last))).square()
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


SCHEDULES: dict[str, Schedule] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}
"""The schedules by the name that diffusion.schedule gives them."""

"""Samplers: from noise to images, as pure functions of a callable that predicts the noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist.diffusion.gaussian import GaussianDiffusion

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t float32 [B, ...], t int64 [B]) -> predicted noise [B, ...]."""


def _nothing() -> None:
    pass


@torch.no_grad()
def ddpm_sample(
    denoiser: Denoiser,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor],
    on_step: Callable[[], None] = _nothing,
) -> Tensor:
    """Ancestral sampling over all T timesteps with variance β_t.

    Ho et al. 2020, algorithm 2 (arXiv:2006.11239). Nothing is clipped inside the loop.

    Args:
        denoiser: predicts the noise in x_t.
        x_T: float32 [B, ...], standard normal.
        draw_noise: fresh standard normal noise of x_T's shape; called T - 1 times.
        on_step: called after each timestep; may raise to stop.

    Returns:
        float32 [B, ...] in [-1, 1].
    """
    x = x_T
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
        x = diffusion.p_mean(x, t, denoiser(x, t).float())
        if step > 0:
            x = x + diffusion.sqrt_betas[step] * draw_noise()
        on_step()
    return x.clamp(-1, 1)


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    num_steps: int = 50,
    clip: bool = True,
    on_step: Callable[[], None] = _nothing,
) -> Tensor:
    """Deterministic DDIM over evenly spaced timesteps from T - 1 to 0.

    Song et al. 2021, eq. 12 with σ = 0 (arXiv:2010.02502).

    Args:
        denoiser: predicts the noise in x_t.
        x_T: float32 [B, ...], standard normal.
        num_steps: timesteps visited, 1 .. T.
        clip: clip the predicted x_0 to [-1, 1] at each step, and the result.
        on_step: called after each timestep; may raise to stop.

    Returns:
        float32 [B, ...], in [-1, 1] if clip.
    """
    x = x_T
    timesteps = ddim_timesteps(diffusion.num_timesteps, num_steps)
    for step, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
        x = ddim_step(diffusion, x, denoiser(x, t).float(), step, previous, clip)
        on_step()
    return x


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """num_steps evenly spaced timesteps, falling from T - 1 to 0 (both included for num_steps >= 2).

    Raises:
        ValueError: num_steps is not in 1 .. T.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"steps={num_steps}: expected 1 .. {num_timesteps}")
    spaced = torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64)
    return [int(step) for step in spaced.round()]


def ddim_step(
    diffusion: GaussianDiffusion, x_t: Tensor, eps: Tensor, step: int, previous: int, clip: bool = True
) -> Tensor:
    """x_{t'} = sqrt(ᾱ_t') x̂_0 + sqrt(1 - ᾱ_t') ε̂  (Song et al. 2021, eq. 12, σ = 0).

    Args:
        x_t, eps: float32 [B, ...].
        step, previous: t and t' in [0, T-1], t' < t; -1 means t' is the image itself (ᾱ = 1).
        clip: clip x̂_0 to [-1, 1], and take ε̂ from the clipped x̂_0, so that the two still make up x_t.

    Returns:
        float32 [B, ...].
    """
    t = torch.full((len(x_t),), step, dtype=torch.long, device=x_t.device)
    x_start = diffusion.predict_start_from_eps(x_t, t, eps)
    if clip:
        x_start = x_start.clamp(-1, 1)
        signal = diffusion.sqrt_alphas_cumprod[step] * x_start
        eps = (x_t - signal) / diffusion.sqrt_one_minus_alphas_cumprod[step]
    if previous < 0:
        return x_start
    signal = diffusion.sqrt_alphas_cumprod[previous] * x_start
    return signal + diffusion.sqrt_one_minus_alphas_cumprod[previous] * eps

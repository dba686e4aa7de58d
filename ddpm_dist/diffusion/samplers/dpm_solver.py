"""DPM-Solver++(2M): good images in about 20 steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers.options import NO_OPTIONS, SamplerOptions, no_noise, nothing


@torch.no_grad()
def dpm_solver_sample(
    denoiser: Denoise,
    process: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor] = no_noise,
    options: SamplerOptions = NO_OPTIONS,
    on_step: Callable[[], None] = nothing,
) -> Tensor:
    """DPM-Solver++(2M) over 50 timesteps at even distances in log SNR, or as options say. No noise is drawn.

    Lu et al. 2022, algorithm 2 (arXiv:2211.01095). It solves the ODE whose variable is λ = log(α / σ), half the
    logarithm of the SNR, with α = sqrt(ᾱ_t) and σ = sqrt(1 - ᾱ_t): x_0 is extrapolated along λ from the last two
    timesteps. With even timesteps the last steps in λ would be far too long for that. The first step has no timestep
    before it, and the one to the image has no end in λ: both are of first order. `Sample` describes the arguments.

    Returns:
        float32 [B, ...], in [-1, 1] if the denoiser clips.

    Raises:
        ValueError: options.steps is not in 1 .. T.
    """
    x, before = x_T, None
    timesteps = options.timesteps(process, "log_snr")
    for index, step in enumerate(timesteps):
        x_start = denoiser(x, torch.full((len(x),), step, dtype=torch.long, device=x.device)).x_start
        on_step()
        if index == len(timesteps) - 1:
            break
        direction, following = x_start, timesteps[index + 1]
        log_step = _half_log_snr(process, following) - _half_log_snr(process, step)
        if before is not None:
            last_log_step = _half_log_snr(process, step) - _half_log_snr(process, timesteps[index - 1])
            # With zero terminal SNR, λ begins at -∞: then the timestep before says nothing, and counts 0.
            weight = log_step / last_log_step / 2
            direction = (1 + weight) * x_start - weight * before
        alpha, sigma = _signal_and_noise(process, following)
        x = (sigma / _signal_and_noise(process, step)[1]) * x - (alpha * math.expm1(-log_step)) * direction
        before = x_start
    return x_start


def _signal_and_noise(process: GaussianDiffusion, step: int) -> tuple[float, float]:
    """α = sqrt(ᾱ_t) and σ = sqrt(1 - ᾱ_t)."""
    alpha_cumprod = process.exact_alphas_cumprod[step]
    return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


def _half_log_snr(process: GaussianDiffusion, step: int) -> float:
    """λ = log(α / σ); -∞ where ᾱ_t is 0."""
    alpha, sigma = _signal_and_noise(process, step)
    return math.log(alpha / sigma) if alpha else -math.inf

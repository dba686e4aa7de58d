"""DDIM: from noise to images in few steps, with as much fresh noise as one wants."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers.options import NO_OPTIONS, SamplerOptions, no_noise, nothing


@torch.no_grad()
def ddim_sample(
    denoiser: Denoise,
    process: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor] = no_noise,
    options: SamplerOptions = NO_OPTIONS,
    on_step: Callable[[], None] = nothing,
) -> Tensor:
    """DDIM over 50 evenly spaced timesteps, or options.steps and options.spacing. `Sample` describes the arguments.

    Song et al. 2021, eq. 12 with σ of eq. 16 (arXiv:2010.02502). No noise is drawn unless options.eta is above 0, and
    none for the step to the image.

    Returns:
        float32 [B, ...], in [-1, 1] if the denoiser clips.

    Raises:
        ValueError: options.steps is not in 1 .. T.
    """
    x = x_T
    timesteps = options.timesteps(process)
    for step, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
        x_start, eps = denoiser(x, t)[:2]
        if options.eta and previous >= 0:
            x = _noisy_step(process, x_start, eps, step, previous, options.eta, draw_noise())
        else:
            x = ddim_step(process, x_start, eps, previous)
        on_step()
    return x


def ddim_step(process: GaussianDiffusion, x_start: Tensor, eps: Tensor, previous: int) -> Tensor:
    """x_{t'} = sqrt(ᾱ_t') x̂_0 + sqrt(1 - ᾱ_t') ε̂  (Song et al. 2021, eq. 12, σ = 0).

    Args:
        x_start, eps: float32 [B, ...], as predicted at t.
        previous: t' in [0, T-1], t' < t; -1 asks for the image itself (ᾱ = 1).

    Returns:
        float32 [B, ...].
    """
    if previous < 0:
        return x_start
    signal = process.sqrt_alphas_cumprod[previous] * x_start
    return signal + process.sqrt_one_minus_alphas_cumprod[previous] * eps


def _noisy_step(
    process: GaussianDiffusion, x_start: Tensor, eps: Tensor, step: int, previous: int, eta: float, noise: Tensor
) -> Tensor:
    """x_{t'} = sqrt(ᾱ_t') x̂_0 + sqrt(1 - ᾱ_t' - σ²) ε̂ + σ ε  (Song et al. 2021, eq. 12).

    σ² = η² (1 - ᾱ_t') / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_t') (eq. 16), so that η = 1 is ancestral sampling with variance β̃.
    """
    now, then = process.exact_alphas_cumprod[step], process.exact_alphas_cumprod[previous]
    variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
    return math.sqrt(then) * x_start + math.sqrt(1 - then - variance) * eps + math.sqrt(variance) * noise

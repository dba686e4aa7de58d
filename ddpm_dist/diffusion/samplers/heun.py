"""Heun's method: two calls of the denoiser a step, for errors that fall with the square of the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers.ddim import ddim_step
from ddpm_dist.diffusion.samplers.options import NO_OPTIONS, SamplerOptions, no_noise, nothing
from ddpm_dist.diffusion.samplers.spacing import ONLY_NOISE


@torch.no_grad()
def heun_sample(
    denoiser: Denoise,
    process: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor] = no_noise,
    options: SamplerOptions = NO_OPTIONS,
    on_step: Callable[[], None] = nothing,
) -> Tensor:
    """Heun's method over 50 timesteps at even distances in log SNR, or as options say. No noise is drawn.

    Karras et al. 2022, algorithm 1 (arXiv:2206.00364), for this process: s_t = sqrt(ᾱ_t), σ_t = sqrt((1 - ᾱ_t) / ᾱ_t),
    and the derivative dx̂/dσ of x̂ = x / s is ε. The step to the image is Euler's, as in the paper; so are those from
    timesteps with hardly anything but noise (`_corrects`). Euler's step is that of DDIM. `Sample` describes the
    arguments.

    Returns:
        float32 [B, ...]; not limited to [-1, 1], except for the step to the image if the denoiser clips.

    Raises:
        ValueError: options.steps is not in 1 .. T.
    """

    def denoised(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        x_start, eps = denoiser(x, torch.full((len(x),), step, dtype=torch.long, device=x.device))[:2]
        on_step()
        return x_start, eps

    x, timesteps = x_T, options.timesteps(process, "log_snr")
    for step, following in itertools.pairwise(timesteps):
        x_start, eps = denoised(x, step)
        x = ddim_step(process, x_start, eps, following)
        if _corrects(process, step):
            now, then = process.exact_alphas_cumprod[step], process.exact_alphas_cumprod[following]
            # x̂ gets (σ' - σ) (ε' - ε) / 2 more than by Euler's step; multiplied by sqrt(ᾱ_t') it is what x gets.
            longer = math.sqrt(1 - then) - math.sqrt((1 - now) / now * then)
            x = x + (longer / 2) * (denoised(x, following)[1] - eps)
    return denoised(x, timesteps[-1])[0]


def heun_calls(options: SamplerOptions, process: GaussianDiffusion) -> int:
    """How often `heun_sample` calls the denoiser."""
    timesteps = options.timesteps(process, "log_snr")
    return 1 + sum(2 if _corrects(process, step) else 1 for step in timesteps[:-1])


def _corrects(process: GaussianDiffusion, step: int) -> bool:
    """Whether the step from this timestep gets Heun's correction, and is not Euler's.

    An error of the network's x_0 at t' reaches x_t' through the correction, about σ_t ᾱ_t' / 2 times. In the paper σ
    ends at 80. Where hardly anything but noise is left, σ_t is above 160: 81,165 at the last of 4000 timesteps of the
    cosine schedule, and ∞ with zero terminal SNR. There a network that is not perfect does better without it.
    """
    alpha_cumprod = process.exact_alphas_cumprod[step]
    return alpha_cumprod > 0 and math.log(alpha_cumprod / (1 - alpha_cumprod)) / 2 >= ONLY_NOISE

"""Ancestral sampling: each step draws from p(x_{t-1} | x_t)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise, Denoised
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers.options import NO_OPTIONS, SamplerOptions, nothing


@torch.no_grad()
def ddpm_sample(
    denoiser: Denoise,
    process: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor],
    options: SamplerOptions = NO_OPTIONS,
    on_step: Callable[[], None] = nothing,
) -> Tensor:
    """Ancestral sampling over all T timesteps, or options.steps of them. `Sample` describes the arguments.

    Ho et al. 2020, algorithm 2 (arXiv:2006.11239). With fewer steps it is ancestral sampling of the process that has
    only these timesteps (Nichol & Dhariwal 2021, section 4, arXiv:2102.09672). Fresh noise is drawn for each step but
    the last, with the variance that options.variance names.

    Returns:
        float32 [B, ...] in [-1, 1].

    Raises:
        ValueError: options.steps is not in 1 .. T; or options.variance is learned, and the network does not learn it.
    """
    x = x_T
    options = replace(options, steps=ddpm_calls(options, process))
    timesteps = options.timesteps(process)
    spaced = process.respaced(timesteps[::-1])
    respaced = spaced is not process
    for index, step in zip(reversed(range(len(timesteps))), timesteps, strict=True):
        denoised = denoiser(x, torch.full((len(x),), step, dtype=torch.long, device=x.device))
        x = _mean(spaced, x, index, denoised, respaced=respaced)
        if index > 0:
            x = x + _deviation(spaced, index, denoised, options.variance, respaced=respaced) * draw_noise()
        on_step()
    return x.clamp(-1, 1)


def ddpm_calls(options: SamplerOptions, process: GaussianDiffusion) -> int:
    """How often `ddpm_sample` calls the denoiser."""
    return process.num_timesteps if options.steps is None else options.steps


def _mean(process: GaussianDiffusion, x: Tensor, step: int, denoised: Denoised, *, respaced: bool) -> Tensor:
    """The mean of p(x_{t-1} | x_t)  (Ho et al. 2020, eq. 11)."""
    t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
    if respaced or (process.zero_terminal_snr and step == process.num_timesteps - 1):
        # Eq. 11 divides by sqrt(α_t), which is 0 or small here. It stands for the mean of q(x_{t-1} | x_t, x_0).
        return process.q_posterior_mean_variance(denoised.x_start, x, t)[0]
    return process.p_mean(x, t, denoised.eps)


def _deviation(
    process: GaussianDiffusion, step: int, denoised: Denoised, variance: str | None, *, respaced: bool
) -> Tensor:
    """The standard deviation of p(x_{t-1} | x_t), step > 0: float32, a scalar or [B, ...]."""
    if variance == "fixed_large" or (variance is None and denoised.log_variance is None):
        return process.sqrt_betas[step]
    if variance == "fixed_small":
        return process.posterior_variance[step].sqrt()
    if not respaced and denoised.log_variance is not None:
        return torch.exp(0.5 * denoised.log_variance)
    if denoised.variance_weight is None:
        raise ValueError("variance=learned: the network does not learn its variance")
    low, high = process.posterior_log_variance_clipped[step], process.log_betas[step]
    return torch.exp(0.5 * (denoised.variance_weight * high + (1 - denoised.variance_weight) * low))

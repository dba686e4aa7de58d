"""The samplers of the package for a network that predicts the noise, as the tests of this folder call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist.diffusion import samplers
from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.predictions import EpsPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t float32 [B, ...], t int64 [B]) -> predicted noise [B, ...]."""


def nothing() -> None:
    pass


def denoiser_of(predict: Predict, diffusion: GaussianDiffusion, clip: bool) -> Denoiser:
    return Denoiser(predict, diffusion, EpsPrediction(diffusion), clip)


def ddpm_sample(
    predict: Predict,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor],
    on_step: Callable[[], None] = nothing,
) -> Tensor:
    return samplers.ddpm_sample(
        denoiser_of(predict, diffusion, clip=False), diffusion, x_T, draw_noise, on_step=on_step
    )


def ddim_sample(
    predict: Predict,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    num_steps: int = 50,
    clip: bool = True,
    on_step: Callable[[], None] = nothing,
) -> Tensor:
    denoiser = denoiser_of(predict, diffusion, clip)
    return samplers.ddim_sample(
        denoiser, diffusion, x_T, options=samplers.SamplerOptions(steps=num_steps), on_step=on_step
    )


def ddim_step(
    diffusion: GaussianDiffusion, x_t: Tensor, eps: Tensor, step: int, previous: int, clip: bool = True
) -> Tensor:
    """From t = step to t' = previous, with the noise that was predicted at t."""
    t = torch.full((len(x_t),), step, dtype=torch.long)
    x_start, eps = denoiser_of(lambda x, t: eps, diffusion, clip)(x_t, t)[:2]
    return samplers.ddim_step(diffusion, x_start, eps, previous)

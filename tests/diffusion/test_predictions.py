"""Each prediction says the same of an image and its noise as x_0 and ε do; v is that of diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from ddpm_dist.diffusion.predictions import PREDICTIONS, VPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas

T = 1000
TIMESTEPS = torch.tensor([0, 1, 2, 10, 250, 500, 750, 998, 999])
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


@pytest.fixture(scope="module")
def process() -> GaussianDiffusion:
    return GaussianDiffusion(linear_betas(T))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """x_start and noise, each float32 [9, 2, 4, 4]."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(TIMESTEPS), 2, 4, 4)
    return torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_perfect_output_gives_the_image_and_the_noise_back(
    process: GaussianDiffusion, pair: tuple[Tensor, Tensor], name: str
) -> None:
    x_start, noise = pair
    prediction = PREDICTIONS[name](process)
    x_t = process.q_sample(x_start, TIMESTEPS, noise)
    start, eps = prediction.to_x_start_and_eps(x_t, TIMESTEPS, prediction.target(x_start, noise, TIMESTEPS))
    assert start.dtype == eps.dtype == torch.float32
    torch.testing.assert_close(start, x_start, rtol=0, atol=1e-4)  # from ε, x_t's rounding is divided by 0.006
    torch.testing.assert_close(eps, noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_any_output_stands_for_an_image_and_a_noise_that_make_up_x_t(
    process: GaussianDiffusion, pair: tuple[Tensor, Tensor], name: str
) -> None:
    x_t, output = pair
    start, eps = PREDICTIONS[name](process).to_x_start_and_eps(x_t, TIMESTEPS, output)
    torch.testing.assert_close(process.q_sample(start, TIMESTEPS, eps), x_t, rtol=0, atol=2e-5)


def test_v_is_the_velocity_of_diffusers(process: GaussianDiffusion, pair: tuple[Tensor, Tensor]) -> None:
    x_start, noise = pair
    scheduler = DDPMScheduler(T, **SCHEDULE)
    scheduler.alphas_cumprod = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).neg().add(1).cumprod(0)
    theirs = scheduler.get_velocity(x_start.double(), noise.double(), TIMESTEPS)
    target = VPrediction(process).target(x_start, noise, TIMESTEPS)
    torch.testing.assert_close(target.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 250, 998, 999])
def test_the_start_that_v_stands_for_is_that_of_diffusers(
    process: GaussianDiffusion, pair: tuple[Tensor, Tensor], t: int
) -> None:
    x_t, output = pair
    scheduler = DDIMScheduler(T, **SCHEDULE, prediction_type="v_prediction")
    scheduler.alphas_cumprod = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).neg().add(1).cumprod(0)
    scheduler.set_timesteps(T)
    theirs = scheduler.step(output.double(), t, x_t.double()).pred_original_sample
    start, _ = VPrediction(process).to_x_start_and_eps(x_t, torch.full((len(x_t),), t), output)
    torch.testing.assert_close(start.double(), theirs, rtol=1e-5, atol=1e-5)

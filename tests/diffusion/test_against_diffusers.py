"""Our tables, formulas and samplers equal those of diffusers, which were written independently.

diffusers keeps its tables in float32, where 1 - ᾱ_0 = 1e-4 has three digits left. They are compared as they are
once; for the formulas its ᾱ is recomputed from its own betas in float64, so that 1e-5 is within its reach.
"""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from eps_samplers import ddim_sample, ddim_step, ddpm_sample
from torch import Tensor

from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import cosine_betas, linear_betas

T = 1000
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TIMESTEPS = sorted({0, 1, 2, 3, 5, 10, 20, 999, 998, *range(0, T, 37)})
SHAPE = (2, 1, 4, 4)
Scheduler = TypeVar("Scheduler", DDPMScheduler, DDIMScheduler)


def in_float64(scheduler: Scheduler) -> Scheduler:
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def ddpm_scheduler(num_timesteps: int = T, **options: object) -> DDPMScheduler:
    return in_float64(DDPMScheduler(num_timesteps, **SCHEDULE, clip_sample=False, **options))


def ddim_scheduler(num_timesteps: int, num_steps: int, clip: bool) -> DDIMScheduler:
    scheduler = in_float64(DDIMScheduler(num_timesteps, **SCHEDULE, clip_sample=clip, set_alpha_to_one=True))
    scheduler.set_timesteps(num_steps)
    return scheduler


def normal(*names: int) -> Tensor:
    """float32 standard normal, another one for other names."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(sum(97**i * n for i, n in enumerate(names, 1))))


def batch_of(t: int) -> Tensor:
    return torch.full((SHAPE[0],), t)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    """A smooth stand-in for a network that depends on both of its arguments."""
    return torch.tanh(0.7 * x) * torch.cos(t / 50).to(x.dtype).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(linear_betas(T))


def test_betas_equal_the_linear_schedule(diffusion: GaussianDiffusion) -> None:
    torch.testing.assert_close(diffusion.betas, DDPMScheduler(T, **SCHEDULE).betas, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_timesteps", [2, 50, T, 4000])
def test_cosine_betas_equal_those_of_diffusers(num_timesteps: int) -> None:
    theirs = DDPMScheduler(num_timesteps, beta_schedule="squaredcos_cap_v2").betas
    betas = cosine_betas(num_timesteps)
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas.float(), theirs, rtol=1e-5, atol=1e-8)


def test_alphas_cumprod_equal_the_schedulers_own_float32_table(diffusion: GaussianDiffusion) -> None:
    torch.testing.assert_close(diffusion.alphas_cumprod, DDPMScheduler(T, **SCHEDULE).alphas_cumprod, rtol=1e-4, atol=0)
    assert_close(diffusion.alphas_cumprod, DDIMScheduler(T, **SCHEDULE).alphas_cumprod)


def test_q_sample_equals_add_noise_for_a_batch_of_mixed_timesteps(diffusion: GaussianDiffusion) -> None:
    t = torch.tensor(TIMESTEPS)
    x_start = torch.rand(len(t), 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(2))
    theirs = ddpm_scheduler().add_noise(x_start.double(), noise.double(), t)
    assert_close(diffusion.q_sample(x_start, t, noise), theirs)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_predicted_start_and_p_mean_equal_a_ddpm_step_from_eps(diffusion: GaussianDiffusion, t: int) -> None:
    x_t, eps = normal(t, 1), normal(t, 2)
    # The step's own noise has variance β_t ("fixed_large"); drawn again from the same seed, it is taken off.
    scheduler = ddpm_scheduler(variance_type="fixed_large", prediction_type="epsilon")
    step = scheduler.step(eps.double(), t, x_t.double(), generator=torch.Generator().manual_seed(t))
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    mean = step.prev_sample - (scheduler.betas[t].sqrt() * drawn if t > 0 else 0)

    assert_close(diffusion.predict_start_from_eps(x_t, batch_of(t), eps), step.pred_original_sample)
    assert_close(diffusion.p_mean(x_t, batch_of(t), eps), mean)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_posterior_equals_a_ddpm_step_from_x_start(diffusion: GaussianDiffusion, t: int) -> None:
    x_start, x_t = normal(t, 3).clamp(-1, 1), normal(t, 4)
    scheduler = ddpm_scheduler(variance_type="fixed_small", prediction_type="sample")
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t), dtype=torch.float64)

    def step(start: Tensor, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(t)
        stepped: Tensor = scheduler.step(start.double(), t, x.double(), generator=generator).prev_sample
        return stepped

    only_noise = step(torch.zeros(SHAPE), torch.zeros(SHAPE))
    mean, variance = diffusion.q_posterior_mean_variance(x_start, x_t, batch_of(t))
    assert_close(mean, step(x_start, x_t) - only_noise)
    # Relative: the smallest variance above 0 is 5e-5, which an absolute 1e-5 would hardly see.
    theirs = (only_noise / drawn).square()
    torch.testing.assert_close(variance.expand(SHAPE).double(), theirs, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_p_mean_is_the_posterior_mean_of_the_predicted_start(diffusion: GaussianDiffusion, t: int) -> None:
    x_t, eps = normal(t, 5), normal(t, 6)
    x_start = diffusion.predict_start_from_eps(x_t, batch_of(t), eps)
    mean, _ = diffusion.q_posterior_mean_variance(x_start, x_t, batch_of(t))
    assert_close(diffusion.p_mean(x_t, batch_of(t), eps), mean)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("num_steps", [7, 50, T])
def test_ddim_step_equals_a_ddim_step(diffusion: GaussianDiffusion, num_steps: int, clip: bool) -> None:
    scheduler = ddim_scheduler(T, num_steps, clip)
    for t in TIMESTEPS:
        x_t, eps = normal(t, 7), normal(t, 8)
        theirs = scheduler.step(eps.double(), t, x_t.double(), eta=0.0, use_clipped_model_output=clip).prev_sample
        previous = max(t - T // num_steps, -1)
        assert_close(ddim_step(diffusion, x_t, eps, t, previous, clip), theirs)


def test_clipping_is_at_work_in_the_compared_ddim_steps(diffusion: GaussianDiffusion) -> None:
    x_t, eps = normal(500, 7), normal(500, 8)
    clipped, free = (ddim_step(diffusion, x_t, eps, 500, 480, clip) for clip in (True, False))
    assert (clipped - free).abs().max() > 0.01


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_sample_over_all_timesteps_equals_the_schedulers_loop(clip: bool) -> None:
    num_timesteps, x_T = 50, normal(9)
    scheduler = ddim_scheduler(num_timesteps, num_timesteps, clip)
    theirs = x_T.double()
    for t in scheduler.timesteps:
        eps = denoiser(theirs, t[None])
        theirs = scheduler.step(eps, int(t), theirs, use_clipped_model_output=clip).prev_sample
    ours = ddim_sample(denoiser, GaussianDiffusion(linear_betas(num_timesteps)), x_T, num_timesteps, clip)
    assert_close(ours, theirs)


def test_ddpm_sample_with_the_same_noise_equals_the_schedulers_loop() -> None:
    num_timesteps, x_T = 50, normal(10) * 0.3
    scheduler = ddpm_scheduler(num_timesteps, variance_type="fixed_large")
    their_noise, our_noise = (torch.Generator().manual_seed(11) for _ in range(2))
    theirs = x_T.double()
    for t in scheduler.timesteps:
        eps = denoiser(theirs, t[None]).float()  # float32, so that the scheduler draws float32 noise, as we do
        theirs = scheduler.step(eps, int(t), theirs, generator=their_noise).prev_sample
    diffusion = GaussianDiffusion(linear_betas(num_timesteps))
    ours = ddpm_sample(denoiser, diffusion, x_T, lambda: torch.randn(SHAPE, generator=our_noise))
    assert_close(ours, theirs.clamp(-1, 1))
    assert (theirs.abs() < 1).double().mean() > 0.3  # the clamp hides little of the comparison

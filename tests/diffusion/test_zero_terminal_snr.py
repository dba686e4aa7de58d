"""A process whose last timestep is pure noise: nothing in it is NaN, and samplers begin there.

The data of the statistics are one Gaussian N(m, s²), as in test_samplers.py. Its best predictions are linear in x_t:
x_0 with the slope sqrt(ᾱ_t) s² / v_t, where v_t = ᾱ_t s² + 1 - ᾱ_t is the variance of x_t.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from harness import metrics, train
from torch import Tensor

from ddpm_dist import loading, sample
from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.predictions import PREDICTIONS
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SamplerOptions, ddim_sample, ddpm_sample
from ddpm_dist.diffusion.schedules import SCHEDULES

T, MEAN, STD, NUM = 1000, 0.3, 0.1, 8_000
WITHOUT_EPS = [name for name in PREDICTIONS if name != "eps"]
INFINITE_AT_THE_END = {"sqrt_recip_alphas", "eps_coef"}  # the factors of eq. 11, which divides by sqrt(α_t)


def process_of(schedule: str = "linear", num_timesteps: int = T) -> GaussianDiffusion:
    betas = SCHEDULES[schedule](num_timesteps, 1e-4, 0.02)
    return GaussianDiffusion(betas, zero_terminal_snr=True)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_timesteps", [2, 3, 50, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_table_is_finite_but_for_the_end_of_the_two_of_eq_11(schedule: str, num_timesteps: int) -> None:
    process = process_of(schedule, num_timesteps)
    assert float(process.alphas_cumprod[-1]) == float(process.sqrt_alphas_cumprod[-1]) == 0
    assert float(process.sqrt_one_minus_alphas_cumprod[-1]) == 1
    for name, table in vars(process).items():
        if isinstance(table, Tensor):
            assert bool(torch.isfinite(table[:-1]).all())
            assert bool(torch.isfinite(table[-1])) == (name not in INFINITE_AT_THE_END), name


def test_the_last_timestep_is_the_noise_itself() -> None:
    x_start, noise = normal(3, 1, 4, 4, seed=0), normal(3, 1, 4, 4, seed=1)
    assert torch.equal(process_of().q_sample(x_start, torch.full((3,), T - 1), noise), noise)


@pytest.mark.parametrize("name", WITHOUT_EPS)
def test_image_and_noise_come_back_at_the_last_timestep_too(name: str) -> None:
    process, t = process_of(), torch.tensor([0, 1, T // 2, T - 2, T - 1])
    x_start, noise, output = (normal(len(t), 2, 4, 4, seed=seed) for seed in range(3))
    prediction = PREDICTIONS[name](process)
    x_t = process.q_sample(x_start, t, noise)
    start, eps = prediction.to_x_start_and_eps(x_t, t, prediction.target(x_start, noise, t))
    torch.testing.assert_close(start, x_start, rtol=0, atol=1e-5)
    torch.testing.assert_close(eps, noise, rtol=0, atol=1e-4)  # x_t's rounding is divided by sqrt(1 - ᾱ_0) = 0.01
    start, eps = prediction.to_x_start_and_eps(x_t, t, output)
    torch.testing.assert_close(process.q_sample(start, t, eps), x_t, rtol=0, atol=2e-5)


def denoiser_of(name: str, process: GaussianDiffusion, asked: list[int] | None = None) -> Denoiser:
    """The best one for the Gaussian, with a network whose output is what this prediction says."""
    alphas_cumprod = process.alphas_cumprod.double()

    def network(x: Tensor, t: Tensor) -> Tensor:
        if asked is not None:
            asked.append(int(t[0]))
        a = float(alphas_cumprod[t[0]])
        x_start = MEAN + math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a) * (x - math.sqrt(a) * MEAN)
        noise = (x - math.sqrt(a) * x_start) / math.sqrt(1 - a)
        return PREDICTIONS[name](process).target(x_start, noise, t)

    return Denoiser(network, process, PREDICTIONS[name](process), clip=False)


@pytest.mark.parametrize("name", WITHOUT_EPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_begin_at_the_last_timestep_and_draw_from_the_gaussian(schedule: str, name: str) -> None:
    process, asked = process_of(schedule), list[int]()
    generator = torch.Generator().manual_seed(2)
    denoiser = denoiser_of(name, process, asked)
    ancestral = ddpm_sample(denoiser, process, normal(NUM, seed=3), lambda: torch.randn(NUM, generator=generator))
    assert asked == list(reversed(range(T)))
    asked.clear()
    deterministic = ddim_sample(denoiser, process, normal(NUM, seed=4), options=SamplerOptions(steps=T // 2))
    assert (asked[0], asked[-1], len(asked)) == (T - 1, 0, T // 2)
    for samples in (ancestral, deterministic):
        assert abs(float(samples.mean()) - MEAN) < 4.5 * STD / math.sqrt(NUM)
        # Three standard errors are 2.4 %, and the steps of DDIM make it up to 4 % too narrow.
        assert float(samples.std()) == pytest.approx(STD, rel=0.065)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", WITHOUT_EPS)
def test_the_first_step_gives_the_mean_of_the_data_whatever_the_noise(name: str, steps: int) -> None:
    """Without zero terminal SNR the estimate from pure noise is off by sqrt(ᾱ_T) times that noise."""
    process = process_of()
    x_start = denoiser_of(name, process)(normal(50, seed=5), torch.full((50,), T - 1)).x_start
    torch.testing.assert_close(x_start, torch.full((50,), MEAN))
    options = SamplerOptions(steps=steps)
    images = ddim_sample(denoiser_of(name, process), process, normal(5, seed=6), options=options)
    assert bool(torch.isfinite(images).all())


PREDICTION_TYPES = {"x0": "sample", "v": "v_prediction"}


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth stand-in that depends on both of its arguments."""
    return torch.tanh(0.7 * x) * torch.cos(t / 50).to(x.dtype).view(-1, 1, 1, 1)


def in_float64(scheduler: DDPMScheduler | DDIMScheduler) -> DDPMScheduler | DDIMScheduler:
    """diffusers keeps its tables in float32; they are made anew by its own function."""
    scheduler.betas = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, T, dtype=torch.float64))
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.set_timesteps(T)
    return scheduler


@pytest.mark.parametrize("name", WITHOUT_EPS)
def test_ddim_equals_the_loop_of_diffusers(name: str) -> None:
    options = {"prediction_type": PREDICTION_TYPES[name], "rescale_betas_zero_snr": True, "clip_sample": False}
    scheduler, process, x_T = in_float64(DDIMScheduler(T, **options)), process_of(), normal(2, 1, 4, 4, seed=7)
    theirs = x_T.double()
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t[None]), int(t), theirs).prev_sample
    denoiser = Denoiser(network, process, PREDICTIONS[name](process), clip=False)
    ours = ddim_sample(denoiser, process, x_T, options=SamplerOptions(steps=T))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT_EPS)
def test_ddpm_with_the_same_noise_equals_the_loop_of_diffusers(name: str) -> None:
    options = {"prediction_type": PREDICTION_TYPES[name], "rescale_betas_zero_snr": True, "clip_sample": False}
    scheduler = in_float64(DDPMScheduler(T, variance_type="fixed_large", **options))
    process, x_T = process_of(), normal(2, 1, 4, 4, seed=8)
    their_noise, our_noise = (torch.Generator().manual_seed(9) for _ in range(2))
    theirs = x_T.double()
    for t in scheduler.timesteps:
        output = network(theirs, t[None]).float()  # float32, so that the scheduler draws float32 noise, as we do
        theirs = scheduler.step(output, int(t), theirs, generator=their_noise).prev_sample
    denoiser = Denoiser(network, process, PREDICTIONS[name](process), clip=False)
    ours = ddpm_sample(denoiser, process, x_T, lambda: torch.randn(x_T.shape, generator=our_noise))
    torch.testing.assert_close(ours.double(), theirs.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert float((theirs.abs() < 1).double().mean()) > 0.3  # the clamp hides little of the comparison


def test_a_run_trains_and_both_samplers_draw_from_it(tmp_path: Path) -> None:
    keys = ("diffusion.zero_terminal_snr=true", "diffusion.schedule=sigmoid", "diffusion.prediction=v")
    run = train(1, tmp_path, "train.max_steps=4", "diffusion.num_timesteps=10", *keys)
    assert all(math.isfinite(line["loss"]) for line in metrics(run))
    loaded = loading.load_run(run)
    assert float(loaded.process.alphas_cumprod[-1]) == 0
    for options in (["--sampler", "ddpm"], ["--sampler", "ddim", "--steps", "3"]):
        out = tmp_path / f"{options[1]}.png"
        assert sample.main([str(run), "--num", "2", *options, "--out", str(out)]) == 0
        assert out.exists()

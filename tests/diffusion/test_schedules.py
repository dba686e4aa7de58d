"""Each schedule is what its paper says, for any number of timesteps, and as it is or rescaled to end in pure noise."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from ddpm_dist.diffusion.schedules import SCHEDULES, rescale_to_zero_terminal_snr, scaled_linear_betas, sigmoid_betas

NUMBERS = [2, 3, 50, 1000, 4000]
BOTH = [(name, num) for name in SCHEDULES for num in NUMBERS]


def betas_of(name: str, num_timesteps: int) -> Tensor:
    return SCHEDULES[name](num_timesteps, 1e-4, 0.02)


def signal_of(betas: Tensor) -> Tensor:
    """sqrt(ᾱ), float64 [T]."""
    return torch.cumprod(1 - betas, 0).sqrt()


@pytest.mark.parametrize(("name", "num_timesteps"), BOTH)
def test_betas_are_float64_variances_of_any_number_of_timesteps(name: str, num_timesteps: int) -> None:
    betas = betas_of(name, num_timesteps)
    assert (betas.dtype, betas.shape) == (torch.float64, (num_timesteps,))
    assert bool(((betas > 0) & (betas < 1)).all())


@pytest.mark.parametrize("num_timesteps", NUMBERS)
@pytest.mark.parametrize("ends", [(1e-4, 0.02), (0.00085, 0.012)])
def test_scaled_linear_betas_equal_those_of_diffusers(num_timesteps: int, ends: tuple[float, float]) -> None:
    theirs = DDPMScheduler(num_timesteps, *ends, beta_schedule="scaled_linear").betas
    betas = scaled_linear_betas(num_timesteps, *ends)
    torch.testing.assert_close(betas.float(), theirs, rtol=1e-5, atol=0)
    assert (float(betas[0]), float(betas[-1])) == pytest.approx(ends, rel=1e-12)


def sigmoid_alphas_cumprod(num_timesteps: int) -> list[float]:
    """Chen 2023, algorithm 1 (arXiv:2301.10972), and betas of at most 0.999, number by number."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def gamma(t: float, start: float = -3, end: float = 3, tau: float = 0.9) -> float:
        v_start, v_end = sigmoid(start / tau), sigmoid(end / tau)
        return (v_end - sigmoid((t * (end - start) + start) / tau)) / (v_end - v_start)

    found = [1.0]
    for step in range(num_timesteps):
        kept = gamma((step + 1) / num_timesteps) / gamma(step / num_timesteps)
        found.append(found[-1] * max(kept, 0.001))
    return found[1:]


@pytest.mark.parametrize("num_timesteps", NUMBERS)
def test_sigmoid_betas_equal_the_paper_computed_number_by_number(num_timesteps: int) -> None:
    alphas_cumprod = torch.cumprod(1 - sigmoid_betas(num_timesteps), 0)
    expected = torch.tensor(sigmoid_alphas_cumprod(num_timesteps), dtype=torch.float64)
    torch.testing.assert_close(alphas_cumprod, expected, rtol=1e-9, atol=0)


def test_sigmoid_is_half_noise_in_the_middle_and_the_same_from_both_ends() -> None:
    alphas_cumprod = torch.cumprod(1 - sigmoid_betas(1000), 0)[:-1]  # the last beta is cut off
    assert float(alphas_cumprod[499]) == pytest.approx(0.5)
    torch.testing.assert_close(alphas_cumprod, 1 - alphas_cumprod.flip(0))


@pytest.mark.parametrize(("name", "num_timesteps"), BOTH)
def test_rescaled_betas_equal_those_of_diffusers(name: str, num_timesteps: int) -> None:
    betas = betas_of(name, num_timesteps)
    rescaled = rescale_to_zero_terminal_snr(betas)
    torch.testing.assert_close(rescaled, rescale_zero_terminal_snr(betas), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "num_timesteps"), BOTH)
def test_rescaling_moves_the_end_to_pure_noise_and_leaves_the_start(name: str, num_timesteps: int) -> None:
    betas = betas_of(name, num_timesteps)
    before, after = signal_of(betas), signal_of(rescale_to_zero_terminal_snr(betas))
    assert float(after[-1]) == 0
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-12)
    steps, rescaled_steps = before.diff(), after.diff()
    torch.testing.assert_close(rescaled_steps / rescaled_steps[0], steps / steps[0], rtol=1e-6, atol=0)

"""The variance of the reverse step: its limits, its halves of the network's output, and timestep 0."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.losses import SimpleLoss
from ddpm_dist.diffusion.predictions import PREDICTIONS
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import SCHEDULES
from ddpm_dist.diffusion.variance import VARIANCES

T = 50


def limits(schedule: str) -> tuple[np.ndarray, np.ndarray]:
    """log β̃, with that of timestep 1 at 0, and log β; float64 [T]."""
    betas = SCHEDULES[schedule](T, 1e-4, 0.02).numpy()
    alphas_cumprod = np.cumprod(1 - betas)
    lower = betas[1:] * (1 - alphas_cumprod[:-1]) / (1 - alphas_cumprod[1:])
    return np.log(np.concatenate([lower[:1], lower])), np.log(betas)


def log_variance(name: str, schedule: str, v: float = 0.0) -> Tensor:
    """What the variance is at each timestep, float32 [T, C, 1, 1], if the network says v everywhere."""
    variance = VARIANCES[name](GaussianDiffusion(SCHEDULES[schedule](T, 1e-4, 0.02)))
    output = torch.zeros(T, 3 * variance.num_parts, 1, 1)
    output[:, 3:] = v
    return variance.split(output, torch.arange(T))[1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("name", "v", "weights"),
    [
        ("fixed_small", 0.0, (1.0, 0.0)),
        ("fixed_large", 0.0, (0.0, 1.0)),
        ("learned", -1.0, (1.0, 0.0)),
        ("learned", 1.0, (0.0, 1.0)),
        ("learned", 0.0, (0.5, 0.5)),
        ("learned", 0.5, (0.25, 0.75)),
        ("learned", 3.0, (-1.0, 2.0)),  # v is not limited to [-1, 1]
    ],
)
def test_variance_lies_where_it_should(name: str, schedule: str, v: float, weights: tuple[float, float]) -> None:
    low, high = limits(schedule)
    expected = weights[0] * low + weights[1] * high
    if name == "fixed_large":
        expected[0] = low[0]  # as in the code of Ho et al.: pixels are more likely with it than with beta
    found = log_variance(name, schedule, v)
    assert found.dtype == torch.float32
    assert found.shape[1] == (3 if name == "learned" else 1)
    np.testing.assert_allclose(found[:, 0, 0, 0].numpy(), expected, rtol=4e-6)


def test_first_channels_are_the_prediction_and_the_last_the_variance() -> None:
    process = GaussianDiffusion(SCHEDULES["linear"](T, 1e-4, 0.02))
    output, t = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 20, 49])
    prediction, spread = VARIANCES["learned"](process).split(output, t)
    assert torch.equal(prediction, output[:, :3])
    low, high = limits("linear")
    weight = (output[:, 3:].double().numpy() + 1) / 2
    shape = (-1, 1, 1, 1)
    expected = weight * high[t].reshape(shape) + (1 - weight) * low[t].reshape(shape)
    np.testing.assert_allclose(spread.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize("clip", [False, True])
def test_denoiser_says_a_variance_only_if_the_network_learns_it(name: str, clip: bool) -> None:
    process = GaussianDiffusion(SCHEDULES["linear"](T, 1e-4, 0.02))
    variance, prediction = VARIANCES[name](process), PREDICTIONS["eps"](process)
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([3, 30])
    output = torch.randn(2, 3 * variance.num_parts, 4, 4)
    found = Denoiser(lambda x, t: output, process, prediction, clip, variance=variance)(x_t, t)
    expected = Denoiser(lambda x, t: output[:, :3], process, prediction, clip)(x_t, t)
    assert torch.equal(found.x_start, expected.x_start)
    assert torch.equal(found.eps, expected.eps)
    if name == "learned":
        assert found.log_variance is not None
        assert torch.equal(found.log_variance, variance.split(output, t)[1])
    else:
        assert found.log_variance is None


def test_a_loss_that_is_told_no_variance_has_the_reference_one() -> None:
    process = GaussianDiffusion(SCHEDULES["linear"](T, 1e-4, 0.02))
    loss = SimpleLoss(process, PREDICTIONS["eps"](process), contextlib.nullcontext)
    _, found = loss.variance.split(torch.zeros(T, 3, 1, 1), torch.arange(T))
    assert torch.equal(found, log_variance("fixed_large", "linear"))

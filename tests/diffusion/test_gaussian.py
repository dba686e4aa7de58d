"""The forward process and its posterior: round trips, boundaries, tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas

T = 1000
TIMESTEPS = torch.tensor([0, 1, 2, 10, 250, 500, 750, 998, 999])
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "snr",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "sqrt_betas",
    "log_betas",
    "sqrt_recip_alphas",
    "eps_coef",
)


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(linear_betas(T))


def images_and_noise(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)


def float64_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """The definitions of Ho et al. 2020 in numpy; β̃ and its mean's factors by Bayes' rule on precisions."""
    alphas = 1 - betas
    cumulative = np.array([np.prod(alphas[: t + 1]) for t in range(len(betas))])
    previous = np.array([np.prod(alphas[:t]) for t in range(len(betas))])
    with np.errstate(divide="ignore"):
        # q(x_{t-1} | x_0) has precision 1 / (1 - ᾱ_{t-1}), q(x_t | x_{t-1}) tells α / β of x_{t-1}: they add up.
        prior, likelihood = 1 / (1 - previous), alphas / betas
    variance = 1 / (prior + likelihood)
    first = np.sqrt(previous[1:]) * prior[1:] * variance[1:]
    return {
        "betas": betas,
        "alphas_cumprod": cumulative,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(cumulative),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumulative),
        "snr": cumulative / (1 - cumulative),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log([variance[1], *variance[1:]]),  # log 0 at t = 0
        "posterior_mean_coef1": np.concatenate([[1.0], first]),  # at t = 0 the prior is a point: x_0 itself
        "posterior_mean_coef2": likelihood / np.sqrt(alphas) * variance,
        "sqrt_betas": np.sqrt(betas),
        "log_betas": np.log(betas),
        "sqrt_recip_alphas": 1 / np.sqrt(alphas),
        "eps_coef": betas / np.sqrt(1 - cumulative) / np.sqrt(alphas),
    }


@pytest.mark.parametrize("name", TABLES)
def test_table_is_float32_of_a_float64_computation(diffusion: GaussianDiffusion, name: str) -> None:
    table = getattr(diffusion, name)
    assert table.dtype == torch.float32
    assert table.shape == (T,)
    expected = float64_tables(np.linspace(1e-4, 0.02, T))[name]
    # One rounding to float32 is a relative 6e-8; a float32 computation of 1 - ᾱ_0 would be off by 1e-4.
    np.testing.assert_allclose(table.double().numpy(), expected, rtol=7e-8, atol=1e-30)


def test_every_table_of_the_class_is_checked(diffusion: GaussianDiffusion) -> None:
    assert {name for name, value in vars(diffusion).items() if isinstance(value, Tensor)} == set(TABLES)


def test_linear_betas_are_float64_and_reach_both_ends() -> None:
    betas = linear_betas(10, 0.1, 0.4)
    assert betas.dtype == torch.float64
    assert betas.shape == (10,)
    assert (float(betas[0]), float(betas[-1])) == (0.1, 0.4)
    gaps = betas.diff()
    torch.testing.assert_close(gaps, gaps[0].expand(9))


@pytest.mark.parametrize("shape", [(len(TIMESTEPS),), (len(TIMESTEPS), 3), (len(TIMESTEPS), 3, 4, 4)])
def test_predicting_the_start_undoes_q_sample(diffusion: GaussianDiffusion, shape: tuple[int, ...]) -> None:
    x_start, noise = images_and_noise(shape)
    x_t = diffusion.q_sample(x_start, TIMESTEPS, noise)
    assert x_t.shape == shape
    assert x_t.dtype == torch.float32
    restored = diffusion.predict_start_from_eps(x_t, TIMESTEPS, noise)
    # At T - 1 the rounding of x_t (3e-7) is divided by sqrt(ᾱ) = 0.006.
    torch.testing.assert_close(restored, x_start, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(len(TIMESTEPS),), (len(TIMESTEPS), 2, 4, 4)])
def test_each_image_of_a_batch_gets_its_own_timestep(diffusion: GaussianDiffusion, shape: tuple[int, ...]) -> None:
    x_start, noise = images_and_noise(shape)
    together = [
        diffusion.q_sample(x_start, TIMESTEPS, noise),
        diffusion.p_mean(x_start, TIMESTEPS, noise),
        diffusion.q_posterior_mean_variance(x_start, noise, TIMESTEPS)[0],
    ]
    for i, t in enumerate(TIMESTEPS):
        x, n = x_start[i : i + 1], noise[i : i + 1]
        alone = [
            diffusion.q_sample(x, t[None], n),
            diffusion.p_mean(x, t[None], n),
            diffusion.q_posterior_mean_variance(x, n, t[None])[0],
        ]
        for batch, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batch[i : i + 1], single)


def test_q_sample_starts_near_the_image_and_ends_as_noise(diffusion: GaussianDiffusion) -> None:
    x_start, noise = images_and_noise((4, 1, 8, 8))
    first = diffusion.q_sample(x_start, torch.zeros(4, dtype=torch.long), noise)
    last = diffusion.q_sample(x_start, torch.full((4,), T - 1), noise)
    torch.testing.assert_close(first - x_start, 0.01 * noise, rtol=0, atol=1e-4)  # sqrt(β_0) = 0.01
    torch.testing.assert_close(last, noise, rtol=0, atol=0.01)


def test_noise_level_only_rises_and_the_total_variance_stays_one(diffusion: GaussianDiffusion) -> None:
    assert (diffusion.sqrt_one_minus_alphas_cumprod.diff() > 0).all()
    assert (diffusion.sqrt_alphas_cumprod.diff() < 0).all()
    total = diffusion.sqrt_alphas_cumprod.square() + diffusion.sqrt_one_minus_alphas_cumprod.square()
    torch.testing.assert_close(total, torch.ones(T))


def test_posterior_at_timestep_zero_is_the_image_itself(diffusion: GaussianDiffusion) -> None:
    x_start, x_t = images_and_noise((4, 1, 8, 8))
    mean, variance = diffusion.q_posterior_mean_variance(x_start, x_t, torch.zeros(4, dtype=torch.long))
    assert torch.equal(mean, x_start)
    assert torch.equal(variance, torch.zeros(4, 1, 1, 1))


def test_posterior_variance_lies_strictly_between_zero_and_beta(diffusion: GaussianDiffusion) -> None:
    assert (diffusion.posterior_variance[1:] > 0).all()
    assert (diffusion.posterior_variance < diffusion.betas).all()


@pytest.mark.parametrize("shape", [(9,), (9, 2, 4, 4)])
def test_posterior_variance_broadcasts_over_each_image(diffusion: GaussianDiffusion, shape: tuple[int, ...]) -> None:
    x_start, x_t = images_and_noise(shape)
    mean, variance = diffusion.q_posterior_mean_variance(x_start, x_t, TIMESTEPS)
    assert mean.shape == shape
    assert variance.shape == (shape[0], *[1] * (len(shape) - 1))


@pytest.mark.parametrize(
    "betas",
    [
        torch.tensor([0.0, 0.1]),
        torch.tensor([0.1, 1.0]),
        torch.tensor([0.1, -0.1]),
        torch.tensor([0.1, float("nan")]),
        torch.tensor([[0.1, 0.2]]),
        torch.tensor(0.1),
        torch.tensor([]),
    ],
    ids=["zero", "one", "negative", "nan", "two-dimensional", "scalar", "empty"],
)
def test_bad_betas_are_refused_by_name(betas: Tensor) -> None:
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(betas.double())


@pytest.mark.parametrize("shape", [(len(TIMESTEPS),), (len(TIMESTEPS), 3, 4, 4)])
def test_predicting_the_noise_undoes_q_sample(diffusion: GaussianDiffusion, shape: tuple[int, ...]) -> None:
    x_start, noise = images_and_noise(shape)
    x_t = diffusion.q_sample(x_start, TIMESTEPS, noise)
    restored = diffusion.predict_eps_from_start(x_t, TIMESTEPS, x_start)
    # At t = 0 the rounding of x_t (1e-7) is divided by sqrt(1 - ᾱ) = 0.01.
    torch.testing.assert_close(restored, noise, rtol=0, atol=1e-4)

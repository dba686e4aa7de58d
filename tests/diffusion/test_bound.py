"""The variational bound: its parts in slow float64, and Gaussian images, whose likelihood is known exactly."""

from __future__ import annotations

import contextlib
import math

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from gaussian_images import LEVELS, GaussianImages, KnowsAll
from torch import Tensor, nn

from ddpm_dist.diffusion.bound import bound_term, discretized_log_likelihood, normal_kl, prior_term
from ddpm_dist.diffusion.losses import LOSSES, HybridLoss, VariationalLoss
from ddpm_dist.diffusion.predictions import PREDICTIONS
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import SCHEDULES
from ddpm_dist.diffusion.variance import VARIANCES


def process_of(schedule: str, num_timesteps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(SCHEDULES[schedule](num_timesteps, 1e-4, 0.02))


# The two formulas


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_of_two_normals(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    mean, other_mean = torch.randn(2, 500, generator=draw, dtype=torch.float64)
    log_variance, other = torch.randn(2, 500, generator=draw, dtype=torch.float64) * 3 - 5
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()),
        torch.distributions.Normal(other_mean, (other / 2).exp()),
    )
    found = normal_kl(*(value.to(dtype) for value in (mean, log_variance, other_mean, other)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-12)


def test_divergence_of_nearly_equal_variances_is_not_rounded_away() -> None:
    zero, log_variance = torch.zeros(3), torch.tensor([-9.2103])
    difference = torch.tensor([0.0, 1e-3, -1e-3])
    found = normal_kl(zero, log_variance + difference, zero, log_variance)
    torch.testing.assert_close(found, torch.tensor([0.0, 2.5e-7, 2.5e-7]), rtol=5e-3, atol=0)
    assert found[0] == 0


def log_probability(level: int, mean: float, log_variance: float) -> float:
    """Of one level under a normal distribution, with 40 digits."""
    with mpmath.workdps(40):
        scale = mpmath.sqrt(2 * mpmath.exp(log_variance))
        below, above = ((mpmath.mpf(2 * level + side) / 255 - 1 - mean) / scale for side in (-1, 1))
        if level == 0:
            return float(mpmath.log(mpmath.erfc(-above) / 2))
        if level == 255:
            return float(mpmath.log(mpmath.erfc(below) / 2))
        if mean > level / 127.5 - 1:
            below, above = -above, -below
        return float(mpmath.log((mpmath.erfc(below) - mpmath.erfc(above)) / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1e-3, 0.01, 0.2, 1.0])
def test_probability_of_a_level(sigma: float, dtype: torch.dtype) -> None:
    """Far from the mean too, where the probability is e^-100,000 and its logarithm still says where the mean is."""
    levels, means = [0, 1, 2, 100, 128, 253, 254, 255], [-1.3, -1.0, -0.5, 0.0, 0.003, 0.7, 1.0, 1.1]
    log_variance = 2 * math.log(sigma)
    expected = [[log_probability(level, mean, log_variance) for mean in means] for level in levels]
    x = torch.tensor(LEVELS[levels], dtype=dtype)[:, None]
    found = discretized_log_likelihood(
        x, torch.tensor(means, dtype=dtype)[None], torch.tensor(log_variance, dtype=dtype)
    )
    rtol = {torch.float32: 3e-5, torch.float64: 1e-7}[dtype]
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=rtol, atol=2e-7)


@pytest.mark.parametrize("sigma", [1e-3, 0.03, 0.5])
def test_probabilities_of_all_levels_make_one(sigma: float) -> None:
    x, mean = torch.tensor(LEVELS)[:, None], torch.linspace(-1.2, 1.2, 13, dtype=torch.float64)[None]
    log_variance = torch.tensor(2 * math.log(sigma), dtype=torch.float64)
    total = discretized_log_likelihood(x, mean, log_variance).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-9, atol=0)


def test_gradients_of_a_level_are_finite_far_from_the_mean() -> None:
    mean = torch.linspace(-40, 40, 81, requires_grad=True)
    log_variance = torch.full((81,), -9.8, requires_grad=True)
    for level in (0, 1, 100, 255):
        x = torch.full((81,), float(LEVELS[level]), dtype=torch.float32)
        gradients = torch.autograd.grad(discretized_log_likelihood(x, mean, log_variance).sum(), (mean, log_variance))
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# A term, and the losses that are made of it


def slow_terms(schedule: str, num: int, name: str, output: Tensor, x: Tensor, t: Tensor, noise: Tensor) -> np.ndarray:
    """L_t of each image in bits per dimension, from the papers, in float64 and number by number. Prediction: x_0."""
    betas = SCHEDULES[schedule](num, 1e-4, 0.02).numpy()
    bars = np.cumprod(1 - betas)
    terms = []
    for image, said, step, eps in zip(x.double(), output.double(), t.tolist(), noise.double(), strict=True):
        bits, before = 0.0, bars[step - 1] if step else 1.0
        posterior = [betas[s] * (1 - (bars[s - 1] if s else 1.0)) / (1 - bars[s]) for s in range(num)]
        low, high = math.log(posterior[max(step, 1)]), math.log(betas[step])
        channels = len(image)
        for place in np.ndindex(tuple(image.shape)):
            pixel, guess = float(image[place]), float(said[place])
            x_t = math.sqrt(bars[step]) * pixel + math.sqrt(1 - bars[step]) * float(eps[place])
            if name == "learned":
                weight = (float(said[(place[0] + channels, *place[1:])]) + 1) / 2
                spread = weight * high + (1 - weight) * low
            else:
                spread = high if name == "fixed_large" and step else low
            toward = math.sqrt(before) * betas[step] / (1 - bars[step])
            stay = math.sqrt(1 - betas[step]) * (1 - before) / (1 - bars[step])
            mean, true_mean = toward * guess + stay * x_t, toward * pixel + stay * x_t
            if step == 0:
                nats = -log_probability(round((pixel + 1) * 127.5), mean, spread)
            else:
                nats = 0.5 * (spread - low + (posterior[step] + (true_mean - mean) ** 2) / math.exp(spread) - 1)
            bits += nats / math.log(2)
        terms.append(bits / image.numel())
    return np.array(terms)


class Says(nn.Module):
    """A network whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output[: len(x)]


def batch(num_parts: int, num_timesteps: int) -> tuple[Says, Tensor, Tensor, Tensor]:
    """A network that is not far off, images of whole levels with both ends among them, timesteps with 0, and noise."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (7, 2, 2, 3), generator=draw)
    x[0, 0, 0], x[1, 0, 0] = torch.tensor([0, 255, 0]), torch.tensor([255, 0, 255])
    x_start = x.float() / 127.5 - 1
    t = torch.tensor([0, 0, 1, 2, num_timesteps // 2, num_timesteps - 2, num_timesteps - 1])
    guess = x_start + 0.02 * torch.randn(x.shape, generator=draw)
    said = torch.cat([guess, torch.rand(x.shape, generator=draw) * 2.4 - 1.2], dim=1)
    return Says(said[:, : 2 * num_parts]), x_start, t, torch.randn(x.shape, generator=draw)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", VARIANCES)
def test_bound_of_each_image_is_that_of_the_papers(name: str, schedule: str) -> None:
    process = process_of(schedule, 40)
    variance = VARIANCES[name](process)
    network, x_start, t, noise = batch(variance.num_parts, 40)
    loss = VariationalLoss(process, PREDICTIONS["x0"](process), contextlib.nullcontext, variance=variance)
    found = loss(network, x_start, t, noise, {})
    expected = slow_terms(schedule, 40, name, network.output.detach(), x_start, t, noise)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().double().numpy(), 40 * expected, rtol=2e-5, atol=2e-6)
    in_float64 = bound_term(
        process,
        x_start.double(),
        process.q_sample(x_start.double(), t, noise.double()),
        t,
        network.output.detach().double()[:, :2],
        variance.split(network.output.detach().double(), t)[1],
    )
    np.testing.assert_allclose(in_float64.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_what_is_left_of_an_image_at_the_last_timestep() -> None:
    process = process_of("linear", 100)
    bar = float(torch.cumprod(1 - SCHEDULES["linear"](100, 1e-4, 0.02), 0)[-1])
    x = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    nats = 0.5 * (bar * x.numpy() ** 2 + (1 - bar) - 1 - math.log(1 - bar))
    expected = nats.reshape(3, -1).mean(1) / math.log(2)
    np.testing.assert_allclose(prior_term(process, x).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["simple", "min_snr", "p2"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss_teaches_the_variance_without_moving_the_mean(weighting: str, prediction: str) -> None:
    """Nichol & Dhariwal 2021, eq. 16, with λ = 0.001: for T = 4000, 4 times the term in bits/dim beside the error."""
    process = process_of("cosine", 4000)
    variance, meaning = VARIANCES["learned"](process), PREDICTIONS[prediction](process)
    network, x_start, _, noise = batch(2, 4000)
    t = torch.tensor([0, 1, 30, 700, 1500, 2000, 3000])
    with torch.no_grad():  # not far off, in the words of this prediction
        network.output[:, :2] = meaning.target(x_start, noise, t) + 0.01 * network.output[:, :2]
    arguments = (process, meaning, contextlib.nullcontext, 5.0)
    simple = LOSSES[weighting](*arguments, variance)
    bound = VariationalLoss(*arguments, variance)
    each = HybridLoss(simple, bound, 0.001)(network, x_start, t, noise, {})
    (gradient,) = torch.autograd.grad(each.sum(), network.output)

    part = Says(network.output.detach()[:, :2])
    alone = simple(part, x_start, t, noise, {})
    (gradient_alone,) = torch.autograd.grad(alone.sum(), part.output)
    terms = bound(network, x_start, t, noise, {})
    (of_the_bound,) = torch.autograd.grad(terms.sum(), network.output)
    torch.testing.assert_close(each, alone + 4.0 * terms / 4000, rtol=1e-5, atol=1e-7)
    assert torch.equal(gradient[:, :2], gradient_alone), "the bound moves no mean"
    torch.testing.assert_close(gradient[:, 2:], 0.001 * of_the_bound[:, 2:], rtol=1e-5, atol=1e-8)
    assert bool((gradient[:, 2:] != 0).all())
    assert bool((of_the_bound[:, :2] != 0).any()), "or the test would show nothing"


# Gaussian images


def expected_terms(loss: VariationalLoss, network: nn.Module, images: GaussianImages) -> tuple[Tensor, float]:
    """The expectation of L_0 .. L_{T-1}, float64 [T], and of L_T, over images and noise, by exact quadrature."""
    mean, variance = images.moments()
    # A divergence is quadratic in x_0 and ε, so four points with the right moments are exact.
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x_start = (mean + math.sqrt(variance) * signs[:, 0]).view(1, 1, 2, 2).expand(999, -1, -1, -1)
    noise = signs[:, 1].view(1, 1, 2, 2).expand(999, -1, -1, -1)
    divergences = loss(network, x_start, torch.arange(1, 1000), noise, {}).double() / 1000
    # All levels, and 40 points of the noise (Gauss and Hermite).
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    x_start = torch.tensor(np.repeat(LEVELS, 40), dtype=torch.float32).view(-1, 1, 1, 1)
    noise = torch.tensor(np.tile(points, 256), dtype=torch.float32).view(-1, 1, 1, 1)
    decoding = loss(network, x_start, torch.zeros(len(noise), dtype=torch.long), noise, {}).double() / 1000
    together = torch.tensor(np.outer(images.probabilities, weights / weights.sum())).flatten()
    prior = 0.5 * prior_term(loss.process, torch.tensor([[mean + variance**0.5], [mean - variance**0.5]])).sum()
    return torch.cat([(together * decoding).sum()[None], divergences]), float(prior)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_of_the_best_network_is_the_exact_likelihood(prediction: str, schedule: str) -> None:
    images, process = GaussianImages(), process_of(schedule)
    network = KnowsAll(images, SCHEDULES[schedule](1000, 1e-4, 0.02), prediction, learned=True)
    loss = VariationalLoss(
        process, PREDICTIONS[prediction](process), contextlib.nullcontext, variance=VARIANCES["learned"](process)
    )
    terms, prior = expected_terms(loss, network, images)
    assert float(terms.sum()) + prior == pytest.approx(images.bits, abs=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("name", "about"), [("fixed_small", 0.75), ("fixed_large", 0.1)])
def test_a_fixed_variance_costs_what_the_closed_form_says(name: str, about: float, schedule: str) -> None:
    """A variance s where r s is best costs (r - 1 - log r) / 2 nats."""
    images, process = GaussianImages(), process_of(schedule)
    network = KnowsAll(images, SCHEDULES[schedule](1000, 1e-4, 0.02), "eps", learned=False)
    variance = VARIANCES[name](process)
    loss = VariationalLoss(process, PREDICTIONS["eps"](process), contextlib.nullcontext, variance=variance)
    terms, prior = expected_terms(loss, network, images)
    fixed = variance.split(torch.zeros(1000, 1, 1, 1), torch.arange(1000))[1].double().exp().flatten()
    best, width = network.best.clone(), torch.zeros(1000, dtype=torch.float64)
    width[0] = (2 / 255) ** 2 / 12
    ratio = (best + width) / (fixed + width)
    gap = float((0.5 * (ratio - 1 - ratio.log()) / math.log(2)).sum())
    # The best deviation at t = 0 is 0.01 with the linear schedule, and 0.006 with the cosine: less than a level's width
    # of 0.0078, so that an interval is not quite a variance.
    tolerance = {"linear": 1e-3, "cosine": 3e-3}[schedule]
    assert float(terms.sum()) + prior == pytest.approx(images.bits + gap, abs=tolerance)
    assert gap == pytest.approx(about, abs=0.15)

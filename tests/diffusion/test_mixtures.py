"""Every sampler against data whose best denoiser is known in closed form: one Gaussian, and mixtures of Gaussians.

With x_0 ~ Σ w_k N(m_k, s²), x_t ~ Σ w_k N(sqrt(ᾱ_t) m_k, v_t), v_t = ᾱ_t s² + 1 - ᾱ_t. Given the component, the mean
of x_0 is linear in x_t; how likely the components are, Bayes' rule says. Each element of a tensor is a sample of its
own. The deterministic samplers solve an ODE that keeps the order of the samples. So its exact solution is known too: it
maps each quantile of the noise to the same quantile of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise, Denoised, Denoiser
from ddpm_dist.diffusion.predictions import EpsPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SamplerOptions, find_sampler
from ddpm_dist.diffusion.schedules import SCHEDULES

T, NUM = 1000, 8_000
SIGMAS = 4.5


@dataclass(frozen=True)
class Mixture:
    """Weights and means of the components, and their common standard deviation."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    std: float

    def denoiser(self, process: GaussianDiffusion) -> Denoise:
        """The best one, computed in float64; it also says the best variance of a step by one timestep."""
        weights, means = torch.tensor(self.weights).double(), torch.tensor(self.means).double()

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            step = int(t[0])
            a = process.exact_alphas_cumprod[step]
            variance = a * self.std**2 + 1 - a
            off = x.double()[..., None] - math.sqrt(a) * means
            likely = torch.softmax(weights.log() - off.square() / (2 * variance), dim=-1)
            starts = means + math.sqrt(a) * self.std**2 / variance * off
            x_start = (likely * starts).sum(-1)
            spread = (likely * starts.square()).sum(-1) - x_start.square() + self.std**2 * (1 - a) / variance
            eps = (x.double() - math.sqrt(a) * x_start) / math.sqrt(1 - a)
            # Var(x_{t-1} | x_t) is that of the posterior, and what the uncertainty of x_0 adds to its mean.
            small, factor = float(process.posterior_variance[step]), float(process.posterior_mean_coef1[step])
            log_variance = (small + factor**2 * spread).log()
            return Denoised(x_start.float(), eps.float(), log_variance.float())

        return denoise

    def quantiles(self, levels: Tensor) -> Tensor:
        """Where the distribution function is as given, float64, by bisection."""
        low, high = torch.full_like(levels, -2), torch.full_like(levels, 2)
        for _ in range(60):
            middle = (low + high) / 2
            below = torch.zeros_like(levels)
            for weight, mean in zip(self.weights, self.means, strict=True):
                below += weight * torch.special.ndtr((middle - mean) / self.std)
            low, high = torch.where(below < levels, middle, low), torch.where(below < levels, high, middle)
        return low


GAUSSIAN = Mixture((1.0,), (0.3,), 0.1)
TWO = Mixture((0.3, 0.7), (-0.5, 0.5), 0.1)
THREE = Mixture((0.2, 0.5, 0.3), (-0.6, 0.0, 0.6), 0.08)


def draw(name: str, mixture: Mixture, options: SamplerOptions, process: GaussianDiffusion, num: int = NUM) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(num, 1, generator=torch.Generator().manual_seed(0))
    return find_sampler(name).sample(
        mixture.denoiser(process),
        process,
        x_T,
        lambda: torch.randn(num, 1, generator=generator),
        options,
        lambda: None,
    )


DETERMINISTIC = [
    ("ddim", SamplerOptions(steps=250)),
    ("ddim", SamplerOptions(steps=250, spacing="leading")),
    ("ddim", SamplerOptions(steps=250, spacing="trailing")),
    ("ddim", SamplerOptions(steps=100, spacing="quadratic")),
    ("dpm++", SamplerOptions(steps=50)),
    ("heun", SamplerOptions(steps=50)),
    ("diffusers:UniPCMultistepScheduler", SamplerOptions(steps=200)),
]
WITH_NOISE = [
    ("ddim", SamplerOptions(steps=500, eta=1.0)),
    ("ddim", SamplerOptions(steps=200, eta=0.5)),
    ("ddpm", SamplerOptions(variance="learned")),
    ("ddpm", SamplerOptions(variance="fixed_large")),
    ("ddpm", SamplerOptions(variance="fixed_small")),
    ("ddpm", SamplerOptions(variance="fixed_large", steps=200)),
]


@pytest.mark.parametrize(("name", "options"), DETERMINISTIC + WITH_NOISE)
@pytest.mark.parametrize("mixture", [GAUSSIAN, TWO, THREE], ids=["one", "two", "three"])
def test_mean_variance_and_weights_of_the_modes_are_those_of_the_data(
    mixture: Mixture, name: str, options: SamplerOptions
) -> None:
    # A quarter of the timesteps for those that visit all of them, with the same noise at the end.
    few = name == "ddpm"
    process = GaussianDiffusion(SCHEDULES["linear"](T // 4, 4e-4, 0.08) if few else SCHEDULES["linear"](T, 1e-4, 0.02))
    drawn = draw(name, mixture, options, process).double().flatten()
    nearest = (drawn[:, None] - torch.tensor(mixture.means)).abs().argmin(1)
    for k, (weight, mean) in enumerate(zip(mixture.weights, mixture.means, strict=True)):
        mode = drawn[nearest == k]
        assert abs(len(mode) / NUM - weight) < SIGMAS * math.sqrt(weight * (1 - weight) / NUM) + 1e-9
        assert abs(float(mode.mean()) - mean) < SIGMAS * mixture.std / math.sqrt(len(mode)) + 2e-3
        # Steps of this size leave an error of a few percent in the width; sampling error comes on top.
        assert float(mode.std()) / mixture.std == pytest.approx(1, abs=0.07 + SIGMAS / math.sqrt(2 * len(mode)))


def test_the_best_variance_draws_the_gaussian_itself_and_the_fixed_ones_lie_on_either_side() -> None:
    """Ho et al. 2020, section 3.2: β is too much and β̃ too little for data that are neither noise nor a point."""
    process, widths = GaussianDiffusion(SCHEDULES["linear"](100, 1e-3, 0.2)), {}
    for variance in ("fixed_small", "learned", "fixed_large"):
        options = SamplerOptions(variance=variance)
        widths[variance] = float(draw("ddpm", GAUSSIAN, options, process, 4 * NUM).std()) / GAUSSIAN.std
    assert widths["fixed_small"] < widths["learned"] - 0.02 < widths["learned"] + 0.02 < widths["fixed_large"]
    # Nothing is drawn at timestep 0. So the variance of x_0 given x_0 with the noise 1 - ᾱ_0 is missing.
    a = process.exact_alphas_cumprod[0]
    left = math.sqrt(a * GAUSSIAN.std**2 / (a * GAUSSIAN.std**2 + 1 - a))
    assert widths["learned"] == pytest.approx(left, abs=SIGMAS / math.sqrt(8 * NUM))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("mixture", [TWO, THREE], ids=["two", "three"])
def test_twenty_steps_of_dpm_solver_and_of_heun_are_closer_to_the_truth_than_twenty_of_ddim(
    mixture: Mixture, zero_terminal_snr: bool, schedule: str
) -> None:
    process = GaussianDiffusion(SCHEDULES[schedule](T, 1e-4, 0.02), zero_terminal_snr=zero_terminal_snr)
    x_T = torch.randn(NUM, 1, generator=torch.Generator().manual_seed(0))
    truth = mixture.quantiles(torch.special.ndtr(x_T.double()))
    options, errors = SamplerOptions(steps=20), {}
    for name in ("ddim", "dpm++", "heun"):
        errors[name] = float((draw(name, mixture, options, process) - truth).abs().mean())
    assert errors["dpm++"] < errors["ddim"] / 2
    assert errors["heun"] < errors["ddim"] / 2
    finer = SamplerOptions(steps=80)
    for name in ("ddim", "dpm++", "heun"):
        assert float((draw(name, mixture, finer, process) - truth).abs().mean()) < errors[name] / 1.5


@pytest.mark.parametrize(
    ("schedule", "num_timesteps"), [("cosine", 4000), ("cosine", T), ("sigmoid", T), ("linear", T)]
)
def test_a_small_error_of_the_network_stays_small_with_heun(schedule: str, num_timesteps: int) -> None:
    """A hundredth of the noise. From σ of the last timestep of such schedules, a correction would magnify it."""
    data, process = Mixture((1.0,), (0.2,), 0.3), GaussianDiffusion(SCHEDULES[schedule](num_timesteps, 1e-4, 0.02))
    best, options = data.denoiser(process), SamplerOptions(steps=20)
    errors = 0.01 * torch.randn(num_timesteps, 1, 64, generator=torch.Generator().manual_seed(5))
    x_T = torch.randn(16, 1, 64, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(lambda x, t: best(x, t).eps + errors[int(t[0])], process, EpsPrediction(process), clip=True)
    calls: list[None] = []
    sampler = find_sampler("heun")
    drawn = sampler.sample(denoiser, process, x_T, lambda: x_T, options, lambda: calls.append(None))
    assert float(drawn.std()) == pytest.approx(data.std, abs=0.04)
    assert float(drawn.mean()) == pytest.approx(0.2, abs=0.04)
    assert len(calls) == sampler.num_calls(options, process) == (39 if schedule == "linear" else 38)

"""The samplers against data with a known answer, and the timesteps they visit.

If the images are drawn from ONE Gaussian N(m, s² I), then x_t ~ N(sqrt(ᾱ) m, v_t I) with v_t = ᾱ_t s² + 1 - ᾱ_t,
and the best prediction of the noise is linear: ε*(x, t) = sqrt(1 - ᾱ_t) (x - sqrt(ᾱ_t) m) / v_t. A right sampler
given ε* draws from N(m, s² I). Each element is a sample of its own, so one tensor is enough for statistics.
s = 0.1 and |m| < 0.4 keep six standard deviations inside [-1, 1]: the clamps then change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from eps_samplers import Predict, ddim_sample, ddim_step, ddpm_sample
from torch import Tensor

from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SamplerOptions
from ddpm_dist.diffusion.schedules import linear_betas

T, S = 1000, 0.1
NUM = 100_000
SIGMAS = 4.5
"""A right sampler fails a check of this many standard errors for 7 seeds in a million; the seeds are fixed."""


def gaussian_denoiser(mean: float, std: float, num_timesteps: int = T) -> Predict:
    """ε* for data from N(mean, std²)."""
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, num_timesteps))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        a = float(alphas_cumprod[int(t[0])])
        return (x - math.sqrt(a) * mean) * (math.sqrt(1 - a) / (a * std**2 + 1 - a))

    return predict


def ddpm_excess_variance(std: float, num_timesteps: int = T) -> float:
    """By how much, relative to std², ancestral sampling with variance β_t overshoots.

    The true reverse step from x_t has variance β_t v_{t-1} / v_t, so β_t adds β_t (v_t - v_{t-1}) / v_t too much.
    On its way to x_0 a variance at t - 1 shrinks by (dE[x_0 | x_{t-1}] / dx_{t-1})² = ᾱ_{t-1} (s² / v_{t-1})².
    The errors are independent, so they add up; at t = 0 nothing is drawn, where β_0 s² / v_0 would be due.
    """
    betas = np.linspace(1e-4, 0.02, num_timesteps)
    alphas_cumprod = np.cumprod(1 - betas)
    variances = alphas_cumprod * std**2 + 1 - alphas_cumprod  # v_t
    before, now = variances[:-1], variances[1:]
    too_much = betas[1:] * (now - before) / now
    shrink = alphas_cumprod[:-1] * (std**2 / before) ** 2
    missing_last = betas[0] * std**2 / variances[0]
    # x_T starts with variance 1 instead of v_{T-1}.
    start = alphas_cumprod[-1] * (std**2 / variances[-1]) ** 2 * (1 - variances[-1])
    return float(((too_much * shrink).sum() - missing_last + start) / std**2)


def sample(
    sampler: str,
    predict: Predict,
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Either sampler over all timesteps; what ddpm draws is 0."""
    if sampler == "ddpm":
        return ddpm_sample(predict, diffusion, x_T, lambda: torch.zeros_like(x_T), on_step)
    return ddim_sample(predict, diffusion, x_T, diffusion.num_timesteps, on_step=on_step)


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    return SamplerOptions(steps=num_steps).timesteps(GaussianDiffusion(linear_betas(num_timesteps)))


def normal(num: int, seed: int) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(linear_betas(T))


@pytest.mark.parametrize("mean", [0.35, -0.2])
def test_ddpm_draws_from_the_gaussian_it_was_given(diffusion: GaussianDiffusion, mean: float) -> None:
    generator = torch.Generator().manual_seed(1)
    samples = ddpm_sample(
        gaussian_denoiser(mean, S), diffusion, normal(NUM, 0), lambda: torch.randn(NUM, generator=generator)
    )
    excess = ddpm_excess_variance(S)
    assert 0 < excess < 0.02  # slight, and in the direction that β_t > β̃_t means
    variance = S**2 * (1 + excess)
    # Standard errors of N Gaussian draws: s / sqrt(N) for the mean (3e-4), and s² sqrt(2 / N) for the variance,
    # 0.45 % of it. The excess is 1.5 %, so β_t is told from β̃_t, which would fall 7 % short.
    assert abs(float(samples.mean()) - mean) < SIGMAS * math.sqrt(variance / NUM)
    assert abs(float(samples.var()) - variance) < SIGMAS * variance * math.sqrt(2 / NUM)


def test_ddpm_excess_vanishes_with_finer_steps() -> None:
    """What the tolerance above rests on: the excess belongs to the discretisation, not to a mistake."""

    def excess(num_timesteps: int) -> float:
        diffusion = GaussianDiffusion(linear_betas(num_timesteps, 0.1 / num_timesteps, 20 / num_timesteps))
        a, b = diffusion.alphas_cumprod.double().numpy(), diffusion.sqrt_betas.double().numpy()
        variance = 1.0
        for t in reversed(range(num_timesteps)):
            # The sampler's own step is linear in x; its slope follows from p_mean at 1 and 0.
            slope = math.sqrt(1 - a[t]) / (a[t] * S**2 + 1 - a[t])
            at_one, at_zero = (
                diffusion.p_mean(torch.tensor([x]), torch.tensor([t]), torch.tensor([x * slope])) for x in (1.0, 0.0)
            )
            variance = float(at_one - at_zero) ** 2 * variance + (b[t] ** 2 if t > 0 else 0.0)
        return variance / S**2 - 1

    coarse, reference, fine = excess(250), excess(1000), excess(4000)
    assert reference == pytest.approx(ddpm_excess_variance(S), abs=5e-4)
    assert coarse > 2 * reference > 4 * fine > 0


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("num_steps", [50, 250, T])
def test_ddim_maps_each_noise_to_its_place_in_the_gaussian(
    diffusion: GaussianDiffusion, num_steps: int, clip: bool
) -> None:
    """Every output, not only their statistics: DDIM is a linear map here.

    With u_t = (sqrt(ᾱ_t) s, sqrt(1 - ᾱ_t)) a step takes the deviation from the mean times u_t'·u_t / |u_t|², where
    the exact flow takes it times |u_t'| / |u_t|: it falls short by the cosine of the angle between them.
    """
    mean, x_T = 0.35, normal(2000, 2)
    samples = ddim_sample(gaussian_denoiser(mean, S), diffusion, x_T, num_steps, clip)

    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    visited = [*alphas_cumprod[np.linspace(T - 1, 0, num_steps).round().astype(int)], 1.0]
    angles = np.diff([math.atan2(math.sqrt(1 - a), math.sqrt(a) * S) for a in visited])
    shortfall = float(np.prod(np.cos(angles)))
    first = visited[0]
    deviation = (x_T.double() - math.sqrt(first) * mean) / math.sqrt(first * S**2 + 1 - first)
    torch.testing.assert_close(samples.double(), mean + S * shortfall * deviation, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_draws_from_the_gaussian_it_was_given(diffusion: GaussianDiffusion, clip: bool) -> None:
    samples = ddim_sample(gaussian_denoiser(0.35, S), diffusion, normal(NUM, 3), T, clip)
    # Standard errors as above. DDIM's own shortfall (the cosines of the test above) is 1 % of the variance at T
    # steps: the last angle alone, from ᾱ_0 to the image, is 0.1, and cos² of it 0.99.
    assert abs(float(samples.mean()) - 0.35) < SIGMAS * S / math.sqrt(NUM)
    sampling_error = SIGMAS * math.sqrt(2 / NUM)
    assert -0.02 - sampling_error < float(samples.var()) / S**2 - 1 < sampling_error


def test_ddim_draws_nothing(diffusion: GaussianDiffusion) -> None:
    state = torch.random.get_rng_state()
    first, second = (ddim_sample(gaussian_denoiser(0.1, S), diffusion, normal(10, 4), 20) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_ddpm_clamps_the_result_but_nothing_inside_the_loop() -> None:
    diffusion = GaussianDiffusion(linear_betas(10))
    seen: list[Tensor] = []

    def nothing_is_noise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    samples = ddpm_sample(
        nothing_is_noise, diffusion, torch.tensor([[-30.0], [0.1], [30.0]]), lambda: torch.zeros(3, 1)
    )
    assert samples[:, 0].tolist() == [-1.0, pytest.approx(0.1, rel=0.1), 1.0]
    assert all(float(x.max()) >= 30 and float(x.min()) <= -30 for x in seen)


def test_ddim_stays_in_range_only_with_clip() -> None:
    diffusion, x_T = GaussianDiffusion(linear_betas(10)), torch.tensor([[-30.0], [30.0]])
    clipped, free = (ddim_sample(lambda x, t: torch.zeros_like(x), diffusion, x_T, 5, clip) for clip in (True, False))
    assert clipped[:, 0].tolist() == [-1.0, 1.0]
    assert free.abs().min() > 1


def test_clipped_ddim_step_keeps_start_and_noise_a_split_of_x_t(diffusion: GaussianDiffusion) -> None:
    """A step to where one already is changes nothing, clipped or not."""
    x_t, eps = normal(50, 5)[:, None], normal(50, 6)[:, None]
    for step in (10, 500, T - 1):
        for clip in (True, False):
            torch.testing.assert_close(ddim_step(diffusion, x_t, eps, step, step, clip), x_t, rtol=1e-4, atol=1e-4)


def test_ddim_step_to_the_image_is_the_predicted_start(diffusion: GaussianDiffusion) -> None:
    x_t, eps, t = normal(50, 7)[:, None], normal(50, 8)[:, None], torch.full((50,), 300)
    start = diffusion.predict_start_from_eps(x_t, t, eps)
    assert torch.equal(ddim_step(diffusion, x_t, eps, 300, -1, clip=False), start)
    assert torch.equal(ddim_step(diffusion, x_t, eps, 300, -1, clip=True), start.clamp(-1, 1))


@pytest.mark.parametrize("num_timesteps", [2, 3, 10, 999, 1000])
def test_ddim_timesteps_are_even_unique_and_reach_both_ends(num_timesteps: int) -> None:
    few, many = range(2, min(num_timesteps, 60)), range(max(2, num_timesteps - 2), num_timesteps + 1)
    for num_steps in {*few, num_timesteps // 2 + 1, *many}:
        timesteps = ddim_timesteps(num_timesteps, num_steps)
        assert len(timesteps) == len(set(timesteps)) == num_steps
        assert (timesteps[0], timesteps[-1]) == (num_timesteps - 1, 0)
        assert timesteps == sorted(timesteps, reverse=True)
        gap = (num_timesteps - 1) / (num_steps - 1)
        # Within half a timestep of the even spacing: no whole number is nearer.
        assert all(abs(num_timesteps - 1 - i * gap - t) <= 0.5 + 1e-9 for i, t in enumerate(timesteps))


@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_as_many_ddim_steps_as_timesteps_visit_them_all(num_timesteps: int) -> None:
    assert ddim_timesteps(num_timesteps, num_timesteps) == list(reversed(range(num_timesteps)))


def test_a_single_ddim_step_starts_from_pure_noise() -> None:
    assert ddim_timesteps(1000, 1) == [999]


@pytest.mark.parametrize("num_steps", [0, -1, 11])
def test_ddim_steps_out_of_bounds_are_refused_with_the_bounds(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={num_steps}.*1 \.\. 10"):
        ddim_timesteps(10, num_steps)
    with pytest.raises(ValueError, match="steps"):
        ddim_sample(lambda x, t: x, GaussianDiffusion(linear_betas(10)), torch.zeros(1, 1), num_steps)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_model_sees_each_timestep_once_from_the_noisiest_down(sampler: str) -> None:
    diffusion, x_T = GaussianDiffusion(linear_betas(12)), torch.zeros(3, 1)
    asked: list[list[int]] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        asked.append(t.tolist())
        return x

    sample(sampler, predict, diffusion, x_T)
    assert asked == [[t] * 3 for t in reversed(range(12))]


def test_ddpm_calls_on_step_after_each_timestep_and_draws_one_time_less() -> None:
    calls = {"on_step": 0, "draw": 0}

    def draw() -> Tensor:
        calls["draw"] += 1
        return torch.zeros(2, 1)

    def on_step() -> None:
        calls["on_step"] += 1

    ddpm_sample(lambda x, t: x, GaussianDiffusion(linear_betas(9)), torch.zeros(2, 1), draw, on_step)
    assert calls == {"on_step": 9, "draw": 8}


def test_ddim_calls_on_step_after_each_visited_timestep() -> None:
    calls: list[None] = []
    ddim_sample(
        lambda x, t: x, GaussianDiffusion(linear_betas(9)), torch.zeros(2, 1), 4, on_step=lambda: calls.append(None)
    )
    assert len(calls) == 4


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_raising_on_step_stops_at_once(sampler: str) -> None:
    diffusion, x_T = GaussianDiffusion(linear_betas(9)), torch.zeros(2, 1)
    predictions: list[None] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        predictions.append(None)
        return x

    def stop_at_third() -> None:
        if len(predictions) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(sampler, predict, diffusion, x_T, stop_at_third)
    assert len(predictions) == 3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_builds_no_graph_and_leaves_the_noise_untouched(sampler: str) -> None:
    diffusion, x_T = GaussianDiffusion(linear_betas(5)), normal(4, 9)[:, None]
    before, weight = x_T.clone(), torch.ones(1, requires_grad=True)
    samples = sample(sampler, lambda x, t: x * weight, diffusion, x_T)
    assert not samples.requires_grad
    assert torch.equal(x_T, before)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim unclipped"])
def test_a_half_precision_prediction_is_all_that_is_in_half_precision(sampler: str) -> None:
    """The formulas go on in float32: as if the denoiser had returned the same values in float32."""
    diffusion, x_T = GaussianDiffusion(linear_betas(5)), normal(40, 10)[:, None]

    def samples(predict: Predict) -> Tensor:
        if sampler == "ddim unclipped":
            return ddim_sample(predict, diffusion, x_T, 5, clip=False)
        return sample(sampler, predict, diffusion, x_T)

    half = samples(lambda x, t: x.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, samples(lambda x, t: x.bfloat16().float()))

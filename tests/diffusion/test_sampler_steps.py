"""Each sampler against an independent one: diffusers where it has it, else float64 written from the paper here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoised, Denoiser
from ddpm_dist.diffusion.predictions import PREDICTIONS
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS, SamplerOptions, find_sampler
from ddpm_dist.diffusion.samplers.spacing import SPACINGS
from ddpm_dist.diffusion.schedules import SCHEDULES, linear_betas
from ddpm_dist.diffusion.variance import VARIANCES

T = 1000
SHAPE = (2, 1, 4, 4)
Array = np.ndarray[Any, Any]


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


LINEAR = GaussianDiffusion(linear_betas(T))


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth stand-in that depends on both of its arguments; as an image it leaves [-1, 1] at times."""
    return 1.5 * torch.tanh(0.7 * x) * torch.cos(t / 50).to(x.dtype).view(-1, 1, 1, 1)


def as_array(predict: Callable[[Tensor, Tensor], Tensor], x: Array, step: int) -> Array:
    output: Array = predict(torch.tensor(x), torch.full((len(x),), step)).numpy()
    return output


def draw(
    name: str, process: GaussianDiffusion, options: SamplerOptions, *, clip: bool, prediction: str = "v", seed: int = 1
) -> Tensor:
    """Images from `network` and the noises of a generator that is seeded by 9."""
    sampler, generator = find_sampler(name), torch.Generator().manual_seed(9)
    denoiser = Denoiser(network, process, PREDICTIONS[prediction](process), clip)
    calls: list[None] = []
    images = sampler.sample(
        denoiser,
        process,
        normal(seed),
        lambda: torch.randn(SHAPE, generator=generator),
        options,
        lambda: calls.append(None),
    )
    assert len(calls) == sampler.num_calls(options, process)
    return images


def noises() -> Callable[[], Array]:
    """The noises that `draw` draws."""
    generator = torch.Generator().manual_seed(9)
    return lambda: torch.randn(SHAPE, generator=generator).double().numpy()


def alphas_cumprod_of(zero_terminal_snr: bool = False) -> Array:
    """With float64 all the way; rescaled by algorithm 1 of Lin et al. 2024."""
    signal = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, T)))
    if zero_terminal_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    squared: Array = signal**2
    return squared


def assert_close(ours: Tensor, theirs: Tensor | Array) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs).double(), rtol=1e-5, atol=1e-5)


def spelled(name: str, value: object) -> str:
    return f"--{name} {value}"


# Spacings


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_timesteps", [2, 10, 999, 1000])
def test_every_number_of_steps_gives_so_many_timesteps_that_fall(spacing: str, num_timesteps: int) -> None:
    process = GaussianDiffusion(linear_betas(num_timesteps))
    for steps in {1, 2, num_timesteps // 2 + 1, num_timesteps - 1, num_timesteps, *range(1, min(num_timesteps, 60))}:
        visited = SamplerOptions(steps=steps, spacing=spacing).timesteps(process)
        assert len(set(visited)) == len(visited) == steps
        assert visited == sorted(visited, reverse=True)
        assert 0 <= visited[-1] <= visited[0] < num_timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 20, 50, 250, 999, 1000])
def test_spacings_are_those_of_diffusers(spacing: str, steps: int) -> None:
    scheduler = DDIMScheduler(T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert SamplerOptions(steps=steps, spacing=spacing).timesteps(LINEAR) == scheduler.timesteps.tolist()


def test_quadratic_spacing_is_that_of_the_authors() -> None:
    """Their code: [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), steps) ** 2]; twice the same for many steps."""
    theirs = [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), 20) ** 2]
    assert SamplerOptions(steps=20, spacing="quadratic").timesteps(LINEAR) == theirs[::-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_log_snr_spacing_is_even_in_the_logarithm_of_the_snr(schedule: str, zero_terminal_snr: bool) -> None:
    process = GaussianDiffusion(SCHEDULES[schedule](T, 1e-4, 0.02), zero_terminal_snr=zero_terminal_snr)
    visited = SamplerOptions(steps=15, spacing="log_snr").timesteps(process)
    assert (visited[0], visited[-1]) == (T - 1, 0)
    half_log_snr = 0.5 * torch.logit(torch.tensor(process.exact_alphas_cumprod, dtype=torch.float64))
    start = max(float(half_log_snr[-1]), -5.1)
    wanted = torch.linspace(start, float(half_log_snr[0]), 15, dtype=torch.float64)[1:]
    found = half_log_snr[visited[1:]]
    nearest = (half_log_snr[:, None] - wanted).abs().min(0).values
    torch.testing.assert_close((found - wanted).abs(), nearest)


# DDIM


def theirs_in_float64(scheduler: Any, steps: int) -> Any:
    scheduler.betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_is_that_of_diffusers(spacing: str, eta: float, clip: bool) -> None:
    process, steps, noise = GaussianDiffusion(linear_betas(T)), 20, noises()
    scheduler = DDIMScheduler(T, clip_sample=clip, timestep_spacing=spacing, prediction_type="v_prediction")
    theirs = theirs_in_float64(scheduler, steps)
    x = normal(1).double()
    for t in theirs.timesteps.tolist():
        fresh = torch.tensor(noise()) if eta and t != theirs.timesteps[-1] else torch.zeros(SHAPE)
        arguments = {"eta": eta, "use_clipped_model_output": True, "variance_noise": fresh}
        x = theirs.step(network(x, torch.tensor([t])), t, x, **arguments).prev_sample
    options = SamplerOptions(steps=steps, spacing=spacing, eta=eta)
    assert_close(draw("ddim", process, options, clip=clip), x)


# Ancestral sampling


def ancestral_in_float64(
    alphas_cumprod: Array, visited: list[int], variance: str, clip: bool, weight: Array | None = None
) -> Array:
    """Ho et al. 2020, eqs. 6 and 7, for the betas of a subsequence (Nichol & Dhariwal 2021, section 4 and eq. 15)."""
    kept = alphas_cumprod[visited[::-1]]
    before = np.concatenate([[1.0], kept[:-1]])
    betas = 1 - kept / before
    x, noise = normal(1).double().numpy(), noises()
    for i, step in reversed(list(enumerate(visited[::-1]))):
        v = as_array(network, x, step)
        x_start = math.sqrt(kept[i]) * x - math.sqrt(1 - kept[i]) * v
        x_start = x_start.clip(-1, 1) if clip else x_start
        x_part = (1 - before[i]) * math.sqrt(1 - betas[i]) * x
        mean = (math.sqrt(before[i]) * betas[i] * x_start + x_part) / (1 - kept[i])
        small = betas[i] * (1 - before[i]) / (1 - kept[i])
        if i == 0:
            last: Array = mean.clip(-1, 1)
            return last
        if variance == "learned":
            assert weight is not None
            chosen = np.exp(weight * np.log(betas[i]) + (1 - weight) * np.log(small))
        else:
            chosen = betas[i] if variance == "fixed_large" else small
        x = mean + np.sqrt(chosen) * noise()
    raise AssertionError


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("steps", [1, 2, 25, T])
def test_ancestral_sampling_is_that_of_the_process_of_fewer_timesteps(
    steps: int, variance: str, clip: bool, zero_terminal_snr: bool
) -> None:
    process = GaussianDiffusion(linear_betas(T), zero_terminal_snr=zero_terminal_snr)
    options = SamplerOptions(steps=steps, variance=variance)
    theirs = ancestral_in_float64(alphas_cumprod_of(zero_terminal_snr), options.timesteps(process), variance, clip)
    assert_close(draw("ddpm", process, options, clip=clip), theirs)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [2, 10, T])
def test_a_learned_variance_lies_between_those_of_the_larger_steps(steps: int, zero_terminal_snr: bool) -> None:
    process = GaussianDiffusion(linear_betas(T), zero_terminal_snr=zero_terminal_snr)
    weight = normal(5) * 0.3 + 0.5  # some of it outside of 0 .. 1, as networks say it
    generator = torch.Generator().manual_seed(9)

    def two_parts(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(x, t), 2 * weight - 1], dim=1)

    denoiser = Denoiser(
        two_parts, process, PREDICTIONS["v"](process), clip=False, variance=VARIANCES["learned"](process)
    )
    options = SAMPLERS["ddpm"].settle("ddpm", SamplerOptions(steps=steps), process, spelled, "learned")
    drawn = SAMPLERS["ddpm"].sample(
        denoiser, process, normal(1), lambda: torch.randn(SHAPE, generator=generator), options, lambda: None
    )
    alphas_cumprod, visited = alphas_cumprod_of(zero_terminal_snr), options.timesteps(process)
    theirs = ancestral_in_float64(alphas_cumprod, visited, "learned", False, weight.double().numpy())
    assert_close(drawn, theirs)


# DPM-Solver++ and Heun


@pytest.mark.parametrize("spacing", ["even", "trailing", "log_snr"])
@pytest.mark.parametrize("steps", [2, 3, 10, 20, 50])
def test_dpm_solver_is_that_of_diffusers(steps: int, spacing: str) -> None:
    """Its default is the midpoint form, 2M; sigmas_type zero makes its last step one of first order to x_0."""
    process, options = GaussianDiffusion(linear_betas(T)), SamplerOptions(steps=steps, spacing=spacing)
    scheduler = DPMSolverMultistepScheduler(T, prediction_type="v_prediction", final_sigmas_type="zero")
    theirs = theirs_in_float64(scheduler, steps)
    visited = options.timesteps(process)
    theirs.set_timesteps(timesteps=visited)
    assert theirs.timesteps.tolist() == visited
    a = alphas_cumprod_of()[visited]
    theirs.sigmas = torch.tensor([*np.sqrt((1 - a) / a), 0.0])  # float64
    x = normal(1).double()
    for t in theirs.timesteps:
        x = theirs.step(network(x, t[None]), t, x).prev_sample
    assert_close(draw("dpm++", process, options, clip=False), x)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_dpm_solver_from_pure_noise_is_algorithm_2_of_the_paper(steps: int) -> None:
    """Lu et al. 2022: D = (1 + 1 / 2r) x_0(t_{i-1}) - 1 / 2r x_0(t_{i-2}), r = h_{i-1} / h_i; here h_1 = ∞."""
    process = GaussianDiffusion(linear_betas(T), zero_terminal_snr=True)
    options = SamplerOptions(steps=steps)
    visited, kept = (
        options.timesteps(process, "log_snr"),
        [*alphas_cumprod_of(True)[options.timesteps(process, "log_snr")]],
    )
    with np.errstate(divide="ignore"):
        half_log_snr = 0.5 * np.log(np.array(kept) / (1 - np.array(kept)))
    x, outputs = normal(1).double().numpy(), list[Array]()
    for i, step in enumerate(visited):
        outputs.append(math.sqrt(kept[i]) * x - math.sqrt(1 - kept[i]) * as_array(network, x, step))
        if i == steps - 1:
            break
        direction, h = outputs[i], half_log_snr[i + 1] - half_log_snr[i]
        if i > 0:
            r = (half_log_snr[i] - half_log_snr[i - 1]) / h
            direction = (1 + 1 / (2 * r)) * outputs[i] - 1 / (2 * r) * outputs[i - 1]
        alpha, sigma = math.sqrt(kept[i + 1]), math.sqrt(1 - kept[i + 1])
        x = sigma / math.sqrt(1 - kept[i]) * x - alpha * (math.exp(-h) - 1) * direction
    assert_close(draw("dpm++", process, options, clip=False), outputs[-1])


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_heun_is_algorithm_1_of_karras(steps: int, zero_terminal_snr: bool) -> None:
    """Karras et al. 2022 in x̂ = x / sqrt(ᾱ) over σ = sqrt((1 - ᾱ) / ᾱ). From σ = ∞, x_T is all noise: x̂ = σ ε there."""
    process = GaussianDiffusion(linear_betas(T), zero_terminal_snr=zero_terminal_snr)
    options = SamplerOptions(steps=steps)
    visited = options.timesteps(process, "log_snr")
    kept = alphas_cumprod_of(zero_terminal_snr)[visited]

    def image(scaled: Array, i: int) -> Array:
        x = math.sqrt(kept[i]) * scaled
        return math.sqrt(kept[i]) * x - math.sqrt(1 - kept[i]) * as_array(network, x, visited[i])

    x_T, first = normal(1).double().numpy(), 0
    if zero_terminal_snr:
        x_start, first = -as_array(network, x_T, visited[0]), 1
        if steps == 1:
            return assert_close(draw("heun", process, options, clip=False), x_start)
        x = x_start + math.sqrt((1 - kept[1]) / kept[1]) * x_T
    else:
        x = x_T / math.sqrt(kept[0])
    sigmas = [*(math.sqrt((1 - a) / a) if a else math.inf for a in kept), 0.0]
    for i in range(first, steps):
        slope = (x - image(x, i)) / sigmas[i]
        euler = x + (sigmas[i + 1] - sigmas[i]) * slope
        if sigmas[i + 1]:
            slope = (slope + (euler - image(euler, i + 1)) / sigmas[i + 1]) / 2
            euler = x + (sigmas[i + 1] - sigmas[i]) * slope
        x = euler
    assert_close(draw("heun", process, options, clip=False), x)
    return None


# Schedulers of diffusers through the adapter


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("ddim", "DDIMScheduler"),
        ("dpm++", "DPMSolverMultistepScheduler"),
        ("heun", "HeunDiscreteScheduler"),
    ],
)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_sampler_through_the_adapter_is_ours(ours: str, theirs: str, prediction: str) -> None:
    process, options = GaussianDiffusion(linear_betas(T)), SamplerOptions(steps=20, spacing="trailing")
    one = draw(ours, process, options, clip=True, prediction=prediction)
    other = draw(f"diffusers:{theirs}", process, options, clip=True, prediction=prediction)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)  # their tables are float32


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    "name",
    ["UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"],
)
def test_further_schedulers_of_diffusers_draw_without_the_global_generator(name: str, zero_terminal_snr: bool) -> None:
    process = GaussianDiffusion(linear_betas(T), zero_terminal_snr=zero_terminal_snr)
    state, options = torch.random.get_rng_state(), SamplerOptions(steps=20)
    images = draw(f"diffusers:{name}", process, options, clip=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw(f"diffusers:{name}", process, options, clip=True), images)
    torch.random.set_rng_state(state)
    assert bool(torch.isfinite(images).all())
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffusers:UniPCMultistep", "has no such scheduler; the nearest is UniPCMultistepScheduler"),
        ("diffusers:UNet2DModel", "has no such scheduler"),
        ("diffusers:FlowMatchEulerDiscreteScheduler", "cannot draw from a DDPM"),
        ("diffusers:IPNDMScheduler", "cannot draw from a DDPM"),
        ("diffusers:CogVideoXDPMScheduler", "the step of it needs"),
        ("diffusers:ScoreSdeVeScheduler", "cannot draw from a DDPM, since it is not made for a schedule of betas"),
        ("diffusers:LCMScheduler", "cannot draw from a DDPM, since it is made for consistency models"),
        ("diffusers:TCDScheduler", "cannot draw from a DDPM, since it is made for consistency models"),
        ("dmim", "expected one of ddim, ddpm, dpm\\+\\+, heun; or diffusers:CLASS"),
    ],
)
def test_a_name_that_stands_for_no_sampler_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        find_sampler(name)


@pytest.mark.parametrize(
    ("name", "zero_terminal_snr", "options", "message"),
    [
        ("KDPM2DiscreteScheduler", False, SamplerOptions(), "between those that the network knows"),
        ("EulerDiscreteScheduler", False, SamplerOptions(spacing="even"), "between those that the network knows"),
        ("DDIMInverseScheduler", False, SamplerOptions(), "turns images into noise"),
        ("DEISMultistepScheduler", True, SamplerOptions(), "zero_terminal_snr"),
        ("DDIMScheduler", False, SamplerOptions(spacing="quadratic"), "has no spacing quadratic"),
        ("CogVideoXDDIMScheduler", False, SamplerOptions(), "changes the schedule"),
        ("CogVideoXDDIMScheduler", True, SamplerOptions(), "changes the schedule"),
        (
            "DDIMScheduler",
            False,
            SamplerOptions(steps=501),
            "T // 501 = 1, and the spacing trailing .*such as 500 or 1000",
        ),
        ("DDIMParallelScheduler", True, SamplerOptions(steps=30), "T // 30 = 33, .*such as 25 or 40"),
        ("PNDMScheduler", False, SamplerOptions(steps=30), "=1000, such as 25 or 40"),
        ("DDIMScheduler", False, SamplerOptions(spacing="even"), "the spacing even has other gaps; .*such as 50$"),
        ("PNDMScheduler", False, SamplerOptions(steps=1), "cannot make 1 steps"),
        ("DDPMScheduler", False, SamplerOptions(steps=1, spacing="even"), "visits only timestep 0 with 1 step"),
        (
            "UniPCMultistepScheduler",
            False,
            SamplerOptions(steps=T, spacing="even"),
            "twice with 1000 steps and .* even",
        ),
        ("SASolverScheduler", False, SamplerOptions(steps=T, spacing="even"), "twice with 1000 steps"),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused_before_anything_is_drawn(
    name: str, zero_terminal_snr: bool, options: SamplerOptions, message: str
) -> None:
    process = GaussianDiffusion(linear_betas(T), zero_terminal_snr=zero_terminal_snr)
    with pytest.raises(ValueError, match=f"^diffusers:{name}: .*{message}"):
        find_sampler(f"diffusers:{name}").num_calls(options, process)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", SamplerOptions(steps=40, spacing="leading")),
        ("DDIMScheduler", SamplerOptions(steps=30, spacing="leading")),  # visits multiples of 33
        ("DDIMScheduler", SamplerOptions(steps=T, spacing="even")),
        ("PNDMScheduler", SamplerOptions(steps=40)),
        ("HeunDiscreteScheduler", SamplerOptions(steps=T)),
        ("UniPCMultistepScheduler", SamplerOptions(steps=999, spacing="even")),
        ("DDPMScheduler", SamplerOptions(steps=501)),
    ],
)
def test_what_a_scheduler_can_do_is_not_refused(name: str, options: SamplerOptions) -> None:
    assert find_sampler(f"diffusers:{name}").num_calls(options, LINEAR) >= (options.steps or 0)


# Clipping of x_0


def test_dynamic_thresholding_is_that_of_diffusers() -> None:
    process = GaussianDiffusion(linear_betas(T))
    scale = torch.tensor([0.2, 3.0]).view(-1, 1, 1, 1)  # one image inside [-1, 1], one far outside
    x_start, t = normal(3).clamp(-2, 2) * scale, torch.tensor([400, 400])
    scheduler = DDIMScheduler(T, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    denoiser = Denoiser(lambda x, t: x_start, process, PREDICTIONS["x0"](process), clip=False, dynamic_threshold=0.9)
    x_t = normal(4)
    found, eps = denoiser(x_t, t)[:2]
    assert_close(found, scheduler._threshold_sample(x_start))
    assert torch.equal(found[0], x_start[0])
    assert float(found[1].abs().max()) == 1
    torch.testing.assert_close(process.q_sample(found, t, eps), x_t)


# What a user may choose


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (
            "ddpm",
            SamplerOptions(eta=0.5),
            "--eta 0.5: --sampler ddpm has no use for it; it takes spacing, steps, variance",
        ),
        ("heun", SamplerOptions(variance="fixed_small"), "--variance fixed_small: --sampler heun has no use for it"),
        ("ddim", SamplerOptions(steps=1001), "--steps 1001: expected 1 to 1000"),
        ("ddpm", SamplerOptions(steps=0), "--steps 0: expected 1 to 1000"),
        ("ddim", SamplerOptions(eta=1.5), "--eta 1.5: expected 0 to 1"),
        ("ddim", SamplerOptions(spacing="linspace"), "--spacing linspace: expected one of even, leading, trailing"),
        (
            "ddpm",
            SamplerOptions(variance="small"),
            "--variance small: expected one of fixed_large, fixed_small",
        ),
        (
            "ddim",
            SamplerOptions(steps=1, spacing="leading"),
            "--spacing leading: visits only timestep 0 with --steps 1",
        ),
        (
            "dpm++",
            SamplerOptions(steps=1, spacing="quadratic"),
            "--spacing quadratic: .*valid: at least 2 steps, or even",
        ),
        ("ddpm", SamplerOptions(variance="learned"), "--variance learned: the network does not learn its variance"),
        ("ddim", SamplerOptions(dynamic_threshold=0), "--dynamic_threshold 0: expected a number above 0"),
        ("ddim", SamplerOptions(dynamic_threshold=0.9, clip=False), "--dynamic_threshold 0.9: .*--clip False forbids"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(sampler: str, options: SamplerOptions, message: str) -> None:
    process = GaussianDiffusion(linear_betas(T))
    with pytest.raises(ValueError, match=f"^{message}"):
        SAMPLERS[sampler].settle(sampler, options, process, spelled)
    SAMPLERS["ddpm"].settle("ddpm", SamplerOptions(variance="learned"), process, spelled, "learned")


def test_spacings_that_begin_below_the_last_timestep_are_refused_with_zero_terminal_snr() -> None:
    process = GaussianDiffusion(linear_betas(T), zero_terminal_snr=True)
    for spacing in ("leading", "quadratic"):
        with pytest.raises(ValueError, match=f"--spacing {spacing}: .*valid: even, log_snr, trailing"):
            SAMPLERS["ddim"].settle("ddim", SamplerOptions(spacing=spacing), process, spelled)
    SAMPLERS["ddim"].settle("ddim", SamplerOptions(spacing="trailing"), process, spelled)


def test_learned_variance_of_a_network_without_it_is_refused_by_the_sampler_too() -> None:
    with pytest.raises(ValueError, match="does not learn its variance"):
        draw("ddpm", GaussianDiffusion(linear_betas(10)), SamplerOptions(variance="learned"), clip=False)


def test_a_learned_variance_is_the_one_of_the_noise() -> None:
    process = GaussianDiffusion(linear_betas(3))

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        return Denoised(torch.zeros_like(x), torch.zeros_like(x), torch.full_like(x, math.log(1e-4)))

    drawn = SAMPLERS["ddpm"].sample(
        denoise, process, torch.zeros(SHAPE), lambda: torch.ones(SHAPE), SamplerOptions(), lambda: None
    )
    # Noise of deviation 0.01 is added twice, and each later mean divides by sqrt(α).
    a = process.sqrt_recip_alphas
    torch.testing.assert_close(drawn, torch.full(SHAPE, 0.01) * (a[0] * a[1] + a[0]))

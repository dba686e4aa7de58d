"""Samplers: from noise to images, as pure functions of a denoiser.

To add a sampler: write a function with the arguments of `Sample`, and enter it in SAMPLERS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise
from ddpm_dist.diffusion.process import GaussianDiffusion


@dataclass(frozen=True)
class SamplerOptions:
    """What a user can choose about a sampler. Each sampler has its own use for some of these (`Sampler.takes`).

    Attributes:
        steps: number of timesteps to visit, 1 .. T; None leaves it to the sampler.
    """

    steps: int | None = None

    def num_steps(self, num_timesteps: int) -> int:
        """The number of timesteps to visit, for samplers that need few: 50 if nothing else is asked for.

        Args:
            num_timesteps: T.
        """
        return min(50, num_timesteps) if self.steps is None else self.steps


class Sample(Protocol):
    """Turns noise into images."""

    def __call__(
        self,
        denoiser: Denoise,
        process: GaussianDiffusion,
        x_T: Tensor,
        draw_noise: Callable[[], Tensor],
        options: SamplerOptions,
        on_step: Callable[[], None],
    ) -> Tensor:
        """The images.

        Args:
            denoiser: (x_t, t) -> Denoised; it decides whether x_start is clipped.
            process: the forward process, with its tables on x_T's device.
            x_T: float32 [B, ...], standard normal.
            draw_noise: returns fresh standard normal noise of x_T's shape at each call.
            options: what the user chose; a sampler ignores those that it does not take.
            on_step: called after each call of the denoiser; may raise to stop.

        Returns:
            float32 [B, ...].
        """


@dataclass(frozen=True)
class Sampler:
    """A sampler, with the facts that its callers need.

    Attributes:
        sample: turns noise into images.
        num_calls: (options, T) -> how often it calls the denoiser, for progress bars.
        clip: whether the denoiser that it gets should clip x_start.
        takes: the names of the options that it has a use for.
    """

    sample: Sample
    num_calls: Callable[[SamplerOptions, int], int]
    clip: bool
    takes: frozenset[str] = frozenset()


NO_OPTIONS = SamplerOptions()


def _nothing() -> None:
    pass


@torch.no_grad()
def ddpm_sample(
    denoiser: Denoise,
    process: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor],
    options: SamplerOptions = NO_OPTIONS,
    on_step: Callable[[], None] = _nothing,
) -> Tensor:
    """Ancestral sampling over all T timesteps with variance β_t. `Sample` describes the arguments.

    Ho et al. 2020, algorithm 2 (arXiv:2006.11239). Fresh noise is drawn T - 1 times.

    Returns:
        float32 [B, ...] in [-1, 1].
    """
    x = x_T
    for step in reversed(range(process.num_timesteps)):
        t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
        x_start, eps, _ = denoiser(x, t)
        if process.zero_terminal_snr and step == process.num_timesteps - 1:
            # Here eq. 11 divides by 0. The mean of q(x_{t-1} | x_t, x_0), which it stands for, is defined.
            x, _ = process.q_posterior_mean_variance(x_start, x, t)
        else:
            x = process.p_mean(x, t, eps)
        if step > 0:
            x = x + process.sqrt_betas[step] * draw_noise()
        on_step()
    return x.clamp(-1, 1)


def _no_noise() -> Tensor:
    raise AssertionError("DDIM with σ = 0 draws no noise")


@torch.no_grad()
def ddim_sample(
    denoiser: Denoise,
    process: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor] = _no_noise,
    options: SamplerOptions = NO_OPTIONS,
    on_step: Callable[[], None] = _nothing,
) -> Tensor:
    """Deterministic DDIM over evenly spaced timesteps from T - 1 to 0. `Sample` describes the arguments.

    Song et al. 2021, eq. 12 with σ = 0 (arXiv:2010.02502). No noise is drawn.

    Returns:
        float32 [B, ...], in [-1, 1] if the denoiser clips.

    Raises:
        ValueError: options.steps is not in 1 .. T.
    """
    x = x_T
    timesteps = ddim_timesteps(process.num_timesteps, options.num_steps(process.num_timesteps))
    for step, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t = torch.full((len(x),), step, dtype=torch.long, device=x.device)
        x_start, eps, _ = denoiser(x, t)
        x = ddim_step(process, x_start, eps, previous)
        on_step()
    return x


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """num_steps evenly spaced timesteps that fall from T - 1 to 0, both included; for num_steps = 1 only T - 1.

    Raises:
        ValueError: num_steps is not in 1 .. T.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"steps={num_steps}: expected 1 .. {num_timesteps}")
    spaced = torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64)
    return [int(step) for step in spaced.round()]


def ddim_step(process: GaussianDiffusion, x_start: Tensor, eps: Tensor, previous: int) -> Tensor:
    """x_{t'} = sqrt(ᾱ_t') x̂_0 + sqrt(1 - ᾱ_t') ε̂  (Song et al. 2021, eq. 12, σ = 0).

    Args:
        x_start, eps: float32 [B, ...], as predicted at t.
        previous: t' in [0, T-1], t' < t; -1 asks for the image itself (ᾱ = 1).

    Returns:
        float32 [B, ...].
    """
    if previous < 0:
        return x_start
    signal = process.sqrt_alphas_cumprod[previous] * x_start
    return signal + process.sqrt_one_minus_alphas_cumprod[previous] * eps


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim_sample, num_calls=SamplerOptions.num_steps, clip=True, takes=frozenset({"steps"})),
    "ddpm": Sampler(ddpm_sample, num_calls=lambda options, num_timesteps: num_timesteps, clip=False),
}
"""The samplers by the name that users give them."""

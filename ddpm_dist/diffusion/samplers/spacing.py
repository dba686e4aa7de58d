"""Which timesteps a sampler visits if it does not visit all of them.

To add a spacing: write a function that returns the timesteps, and enter it in SPACINGS.
"""

from __future__ import annotations

import bisect
import math
import operator
from collections.abc import Callable

import torch

from ddpm_dist.diffusion.process import GaussianDiffusion

ONLY_NOISE = -5.1
"""λ = log(sqrt(ᾱ_t) / sqrt(1 - ᾱ_t)), below which hardly anything but noise is left (Lu et al. 2022)."""


def even_timesteps(process: GaussianDiffusion, num_steps: int) -> list[int]:
    """num_steps evenly spaced timesteps that fall from T - 1 to 0, both included; for num_steps = 1 only T - 1.

    Nichol & Dhariwal 2021, section 4 (arXiv:2102.09672).
    """
    spaced = torch.linspace(process.num_timesteps - 1, 0, num_steps, dtype=torch.float64)
    return [int(step) for step in spaced.round()]


def leading_timesteps(process: GaussianDiffusion, num_steps: int) -> list[int]:
    """Multiples of T // num_steps that fall to 0, as in the code of DDIM (Song et al. 2021, arXiv:2010.02502).

    The first one lies below T - 1, although sampling begins with pure noise: far below if num_steps does not divide T.
    """
    gap = process.num_timesteps // num_steps
    return [gap * i for i in reversed(range(num_steps))]


def trailing_timesteps(process: GaussianDiffusion, num_steps: int) -> list[int]:
    """Timesteps in gaps of T / num_steps that fall from T - 1, and end one gap before the image.

    Lin et al. 2024, section 3.3 (arXiv:2305.08891).
    """
    gap = process.num_timesteps / num_steps
    return [round(process.num_timesteps - i * gap) - 1 for i in range(num_steps)]


def quadratic_timesteps(process: GaussianDiffusion, num_steps: int) -> list[int]:
    """Squares of evenly spaced numbers that fall from 0.8 T to 0: the less noise, the closer they lie.

    Song et al. 2021, appendix D.2, as in their code for CIFAR-10. Where squares fall on the same timestep, later ones
    move up by one.
    """
    gap = math.sqrt(0.8 * process.num_timesteps) / max(num_steps - 1, 1)
    return [max(int((gap * i) ** 2), i) for i in reversed(range(num_steps))]


def log_snr_timesteps(process: GaussianDiffusion, num_steps: int) -> list[int]:
    """Timesteps at even distances in λ = log(sqrt(ᾱ_t) / sqrt(1 - ᾱ_t)), from T - 1 to 0; for num_steps = 1 only T - 1.

    Lu et al. 2022, appendix D of arXiv:2206.00927, for images of low resolution. Below ONLY_NOISE no timestep is
    visited but T - 1, as their code advises for the cosine schedule. Where λ is nearest to the same timestep twice,
    later ones move up by one.
    """
    if num_steps == 1:
        return [process.num_timesteps - 1]
    half_log_snr = [math.log(a / (1 - a)) / 2 if a else -math.inf for a in process.exact_alphas_cumprod]
    gap = (half_log_snr[0] - max(half_log_snr[-1], ONLY_NOISE)) / (num_steps - 1)
    rising: list[int] = []
    for i in range(num_steps - 1):
        nearest = _nearest(half_log_snr, half_log_snr[0] - gap * i)
        room = process.num_timesteps - num_steps + i  # later ones need timesteps too
        rising.append(min(max(nearest, rising[-1] + 1 if rising else 0), room))
    return [process.num_timesteps - 1, *reversed(rising)]


def _nearest(falling: list[float], wanted: float) -> int:
    """The index of the value that is nearest to the wanted one."""
    after = min(bisect.bisect_left(falling, -wanted, key=operator.neg), len(falling) - 1)
    return after - 1 if after and falling[after - 1] - wanted < wanted - falling[after] else after


SPACINGS: dict[str, Callable[[GaussianDiffusion, int], list[int]]] = {
    "even": even_timesteps,
    "leading": leading_timesteps,
    "trailing": trailing_timesteps,
    "quadratic": quadratic_timesteps,
    "log_snr": log_snr_timesteps,
}
"""The spacings by the name that users give them.

(process, num_steps in 1 .. T) -> num_steps timesteps in [0, T-1] that fall.
"""

BEGIN_AT_LAST = frozenset({"even", "trailing", "log_snr"})
"""The spacings that begin at T - 1, where nothing is left of an image with zero terminal SNR."""

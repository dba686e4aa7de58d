"""Which timesteps a sampler visits if it does not visit all of them.

To add a spacing: write a function that returns the timesteps, and enter it in SPACINGS.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def even_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """num_steps evenly spaced timesteps that fall from T - 1 to 0, both included; for num_steps = 1 only T - 1.

    Nichol & Dhariwal 2021, section 4 (arXiv:2102.09672).
    """
    spaced = torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64)
    return [int(step) for step in spaced.round()]


def leading_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Multiples of T // num_steps that fall to 0, as in the code of DDIM (Song et al. 2021, arXiv:2010.02502).

    The first one lies below T - 1, although sampling begins with pure noise.
    """
    gap = num_timesteps // num_steps
    return [gap * i for i in reversed(range(num_steps))]


def trailing_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Timesteps in gaps of T / num_steps that fall from T - 1, and end one gap before the image.

    Lin et al. 2024, section 3.3 (arXiv:2305.08891).
    """
    return [round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps)]


def quadratic_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Squares of evenly spaced numbers that fall from 0.8 T to 0: the less noise, the closer they lie.

    Song et al. 2021, appendix D.2, as in their code for CIFAR-10. Where squares fall on the same timestep, later ones
    move up by one.
    """
    gap = math.sqrt(0.8 * num_timesteps) / max(num_steps - 1, 1)
    return [max(int((gap * i) ** 2), i) for i in reversed(range(num_steps))]


SPACINGS: dict[str, Callable[[int, int], list[int]]] = {
    "even": even_timesteps,
    "leading": leading_timesteps,
    "trailing": trailing_timesteps,
    "quadratic": quadratic_timesteps,
}
"""The spacings by the name that users give them: (T, num_steps in 1 .. T) -> num_steps timesteps in [0, T-1] that fall.
"""

BEGIN_AT_LAST = frozenset({"even", "trailing"})
"""The spacings that begin at T - 1, where nothing is left of an image with zero terminal SNR."""

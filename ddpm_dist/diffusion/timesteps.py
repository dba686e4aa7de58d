"""How the timestep of each image of a batch is drawn in training.

To add a way to draw them: write a class with `draw`, and enter it in TIMESTEP_SAMPLERS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class TimestepSampler(Protocol):
    """Draws timesteps from the given generator alone, so that a resumed run draws the same ones."""

    def draw(self, generator: torch.Generator, n: int) -> Tensor:
        """Draw the timesteps of n images: int64 [n] in [0, T-1]; 0 is the least noisy."""


class UniformTimesteps:
    """Every timestep is as likely as any other (Ho et al. 2020, algorithm 1, arXiv:2006.11239).

    Args:
        num_timesteps: T.
    """

    def __init__(self, num_timesteps: int) -> None:
        self._num_timesteps = num_timesteps

    def draw(self, generator: torch.Generator, n: int) -> Tensor:
        """Draw the timesteps of n images: int64 [n] in [0, T-1]."""
        return torch.randint(0, self._num_timesteps, (n,), generator=generator)


TIMESTEP_SAMPLERS: dict[str, Callable[[int], TimestepSampler]] = {"uniform": UniformTimesteps}
"""The timestep samplers by the name that loss.timestep_sampler gives them."""

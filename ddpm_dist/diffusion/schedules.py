"""Noise schedules: the variances β_1 .. β_T of the forward process, in float64.

To add a schedule: write a function that returns the betas, and enter it in SCHEDULES.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """The betas of all timesteps, the least noisy one first."""

    def __call__(self, num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
        """The betas.

        Args:
            num_timesteps: T.
            beta_start, beta_end: the first and the last beta, in (0, 1); a schedule may ignore them.

        Returns:
            float64 [T] in (0, 1).
        """


def linear_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances that grow linearly from beta_start to beta_end, both included.

    Ho et al. 2020, section 4 (arXiv:2006.11239): T = 1000, 1e-4 .. 0.02.

    Returns:
        float64 [T] in (0, 1).
    """
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


SCHEDULES: dict[str, Schedule] = {"linear": linear_betas}
"""The schedules by the name that diffusion.schedule gives them."""

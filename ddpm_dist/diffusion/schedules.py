"""Noise schedules: betas in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances that grow linearly from beta_start to beta_end, both included.

    Ho et al. 2020, section 4 (arXiv:2006.11239): T = 1000, 1e-4 .. 0.02.

    Returns:
        float64 [T] in (0, 1).
    """
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)

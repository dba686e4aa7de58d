"""Adam, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ddpm_dist.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) with its usual betas; `learning_rate` sets the rate each step."""
    return torch.optim.Adam(model.parameters(), lr=optim.lr, fused=optim.fused)


def learning_rate(step: int, optim: OptimConfig, decay_steps: int | None) -> float:
    """The learning rate of the update that follows `step` finished steps. The number of ranks does not matter.

    It rises linearly to optim.lr over optim.warmup_steps. Then it stays there, or falls along half a cosine to 0 at
    decay_steps (Loshchilov & Hutter 2017, eq. 5 without restarts, arXiv:1608.03983).

    Args:
        step: finished steps, from 0.
        decay_steps: the step at which the cosine reaches 0; None for a constant rate.

    Returns:
        a number in [0, optim.lr].
    """
    warmup = optim.warmup_steps
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    assert decay_steps is not None, "the contract of a run with a cosine says where it ends"
    progress = min(1.0, (step - warmup) / (decay_steps - warmup))
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))

"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ddpm_dist.config import OptimConfig

OPTIMIZERS: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
"""The optimizers by the name that optim.name gives them."""


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that optim.name says, for all weights; `learning_rate` sets the rate each step.

    Adam (Kingma & Ba 2015, arXiv:1412.6980), or AdamW, which before each update multiplies the weights by
    1 - rate · optim.weight_decay (Loshchilov & Hutter 2019, arXiv:1711.05101).
    """
    return OPTIMIZERS[optim.name](
        model.parameters(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay or 0,  # without decay the int 0, as ever: a digest tells it from 0.0
        fused=optim.fused,
    )


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

"""The scheduler of diffusers that samples as our ancestral sampler does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ddpm_dist.diffusion.samplers import SAMPLERS
from ddpm_dist.errors import ConfigError
from ddpm_dist.loading import LoadedRun

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
"""What diffusers calls our predictions."""

VARIANCE_TYPES = {"fixed_large": "fixed_large", "fixed_small": "fixed_small", "learned": "learned_range"}
"""What diffusers calls our variances."""

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
"""What diffusers calls our schedules. Its "sigmoid" is another one than ours."""

ROUNDING = 1e-6  # relative: diffusers computes its betas in float32, ours are rounded to it from float64


def scheduler_of(run: LoadedRun) -> DDPMScheduler:
    """A DDPMScheduler with the betas, the prediction, the variance and the clipping of the run.

    The schedule goes by its name where diffusers makes the same betas of it, and as a list of numbers otherwise. Betas
    that were rescaled to zero terminal SNR go as numbers too, since diffusers loses three digits of the first ones; so
    the flag `rescale_betas_zero_snr`, which would rescale them once more, stays off. The spacing `trailing` begins at
    the last timestep, T - 1, whatever the number of steps; DDIM of diffusers is right with no other spacing.

    Raises:
        ConfigError: diffusers has no such prediction or variance.
    """
    from diffusers import DDPMScheduler

    diffusion, betas = run.config.diffusion, run.process.betas.cpu()
    for key, value, known in (
        ("prediction", diffusion.prediction, PREDICTION_TYPES),
        ("variance", diffusion.variance, VARIANCE_TYPES),
    ):
        if value not in known:
            raise ConfigError(f"--to diffusers: it has no diffusion.{key}={value}; it has {', '.join(known)}")
    options = {
        "num_train_timesteps": len(betas),
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "prediction_type": PREDICTION_TYPES[diffusion.prediction],
        "variance_type": VARIANCE_TYPES[diffusion.variance],
        "clip_sample": SAMPLERS["ddpm"].clip,
        "timestep_spacing": "trailing",
    }
    if name := BETA_SCHEDULES.get(diffusion.schedule):
        scheduler = DDPMScheduler(**options, beta_schedule=name)
        if torch.allclose(scheduler.betas, betas, rtol=ROUNDING, atol=0):
            return scheduler
    return DDPMScheduler(**options, trained_betas=betas.tolist())

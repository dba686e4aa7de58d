"""A network as samplers use it: its estimates of x_0 and of the noise in x_t."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_dist.diffusion.predictions import Prediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.variance import Variance, variance_weight

Network = Callable[..., Tensor]
"""(x_t float32 [B, ...], t int64 [B], **cond) -> its output [B, ...], in float32 or a half precision type."""


class Denoised(NamedTuple):
    """What a denoiser says about x_t. x_start and eps together make up x_t.

    Attributes:
        x_start: the image, float32 [B, ...].
        eps: the noise, float32 [B, ...].
        log_variance: the natural logarithm of the variance of p(x_{t-1} | x_t), float32 [B, ...]; None unless the
            network learns it.
        variance_weight: where it lies between log β̃_t, at 0, and log β_t, at 1 (Nichol & Dhariwal 2021, eq. 15),
            float32 [B, ...]. A sampler that visits fewer timesteps takes the variance of its larger steps from there.
    """

    x_start: Tensor
    eps: Tensor
    log_variance: Tensor | None = None
    variance_weight: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Denoised]
"""(x_t float32 [B, ...], t int64 [B] in [0, T-1]) -> what it is made of; `Denoiser` is one, made of a network."""


@dataclass(frozen=True)
class Denoiser:
    """(x_t, t) -> Denoised, made of a network, the meaning of its output, and clipping.

    Attributes:
        network: in evaluation mode.
        process: the forward process, with its tables on the network's device.
        prediction: how x_0 and ε follow from the network's output.
        clip: whether x_start is clipped to [-1, 1]. eps is then computed from the clipped x_start, so that the two
            still make up x_t. The code of Ho et al. clips at each step; the reference recipe does not.
        dynamic_threshold: if given, x_start is clipped to [-s, s] and divided by s in place of clip; s is this quantile
            of the magnitudes of an image, at least 1 (Saharia et al. 2022, section 2.3, arXiv:2205.11487). It keeps
            strong guidance from making all pixels black or white.
        cond: what the network is conditioned on, each [B, ...].
        variance: of the reverse steps. Only one that the network learns has an effect here.
    """

    network: Network
    process: GaussianDiffusion
    prediction: Prediction
    clip: bool
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    variance: Variance | None = None
    dynamic_threshold: float | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Denoised:
        """The x_0 and the ε that the network predicts from x_t.

        Args:
            x_t: float32 [B, ...].
            t: int64 [B] in [0, T-1]; 0 is the least noisy.

        Returns:
            x_start and eps, each float32 [B, ...].
        """
        output = self.network(x_t, t, **self.cond).float()
        log_variance = weight = None
        if self.variance is not None and self.variance.num_parts == 2:
            weight = variance_weight(output)
            output, log_variance = self.variance.split(output, t)
        x_start, eps = self.prediction.to_x_start_and_eps(x_t, t, output)
        if self.clip or self.dynamic_threshold is not None:
            x_start = _clipped(x_start, self.dynamic_threshold)
            eps = self.process.predict_eps_from_start(x_t, t, x_start)
        return Denoised(x_start, eps, log_variance, weight)


def _clipped(x_start: Tensor, dynamic_threshold: float | None) -> Tensor:
    """x_start [B, ...] in [-1, 1]; see the attributes of `Denoiser`."""
    if dynamic_threshold is None:
        return x_start.clamp(-1, 1)
    bound = torch.quantile(x_start.abs().flatten(1), dynamic_threshold, dim=1).clamp(min=1)
    bound = bound.view(-1, *[1] * (x_start.ndim - 1))
    return x_start.clamp(-bound, bound) / bound

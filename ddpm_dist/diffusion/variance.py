"""The variance of the reverse step p(x_{t-1} | x_t): two that are fixed, and one that the network learns.

To add a variance: write a class with the members of `Variance`, enter it in VARIANCES, and say in samplers/ancestral.py
how it draws; what is entered there alone is drawn from with β.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ddpm_dist.diffusion.process import GaussianDiffusion, per_image


class Variance(Protocol):
    """How the variance of a reverse step follows from its timestep and from the network's output.

    Args:
        process: the forward process, with its tables on the device of the batches.

    Attributes:
        num_parts: how many times the channels of the images the network's output has: 2 if it learns its variance.
    """

    num_parts: int

    def __init__(self, process: GaussianDiffusion) -> None: ...

    def split(self, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What of the output is the prediction, and the logarithm of the variance.

        Args:
            output: float32 [B, num_parts C, ...].
            t: int64 [B] in [0, T-1].

        Returns:
            the prediction's part, float32 [B, C, ...]; the natural logarithm of the variance, float32 [B, C, ...], or
            [B, 1, ...] if it is the same for all pixels.
        """


class _FixedVariance:
    """A variance that depends on the timestep alone.

    At timestep 0 it is β̃ of timestep 1, as in the code of Ho et al. No noise is added there. The value matters for the
    likelihood of pixels alone, which is better with it than with β, and infinitely bad with the β̃ of timestep 0.

    Args:
        log_variance: float32 [T], on the device of the batches.
    """

    num_parts = 1

    def __init__(self, log_variance: Tensor) -> None:
        self._log_variance = log_variance

    def split(self, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """All of the output, and the variance [B, 1, ...]."""
        return output, per_image(self._log_variance, t, output)


class FixedLarge(_FixedVariance):
    """β_t: the best choice if every pixel is standard normal (Ho et al. 2020, section 3.2, arXiv:2006.11239)."""

    def __init__(self, process: GaussianDiffusion) -> None:
        super().__init__(torch.cat([process.posterior_log_variance_clipped[:1], process.log_betas[1:]]))


class FixedSmall(_FixedVariance):
    """β̃_t: the best choice if all images are one and the same (Ho et al. 2020, section 3.2)."""

    def __init__(self, process: GaussianDiffusion) -> None:
        super().__init__(process.posterior_log_variance_clipped)


class LearnedVariance:
    """exp(w log β_t + (1 - w) log β̃_t), w of each pixel (Nichol & Dhariwal 2021, eq. 15, arXiv:2102.09672).

    The second half of the network's channels is v = 2 w - 1, as in the authors' code: it is -1 for β̃_t and 1 for β_t.
    It is not limited to [-1, 1]. At timestep 0, log β̃ is that of timestep 1.
    """

    num_parts = 2

    def __init__(self, process: GaussianDiffusion) -> None:
        self._low, self._high = process.posterior_log_variance_clipped, process.log_betas

    def split(self, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The first half of the channels; the variance [B, C, ...] that the second half stands for."""
        prediction, v = output.chunk(2, dim=1)
        weight = variance_weight(output)
        return prediction, weight * per_image(self._high, t, v) + (1 - weight) * per_image(self._low, t, v)


def variance_weight(output: Tensor) -> Tensor:
    """w of `LearnedVariance`: float32 [B, C, ...] from the network's output, float32 [B, 2 C, ...]."""
    return (output.chunk(2, dim=1)[1] + 1) / 2


VARIANCES: dict[str, type[Variance]] = {
    "fixed_large": FixedLarge,
    "fixed_small": FixedSmall,
    "learned": LearnedVariance,
}
"""The variances by the name that diffusion.variance gives them."""

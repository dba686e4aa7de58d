"""The training loss: one number for each image. The training step takes their mean.

To add a loss or a weighting: derive a class from DenoisingLoss, and enter it in LOSSES.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_dist.diffusion.predictions import Prediction
from ddpm_dist.diffusion.process import GaussianDiffusion

Autocast = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes the context in which the network's forward pass runs in the chosen number format."""


class DenoisingLoss(ABC):
    """How badly a network denoises each image of a batch.

    Args:
        process: the forward process, with its tables on the device of the batches.
        prediction: what the network's output is compared with.
        autocast: the number format of the network's forward pass; x_t and the loss are float32.
    """

    def __init__(self, process: GaussianDiffusion, prediction: Prediction, autocast: Autocast) -> None:
        self.process, self.prediction, self._autocast = process, prediction, autocast

    @abstractmethod
    def __call__(
        self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of each image.

        Args:
            network: (x_t, t, **cond) -> its output, in the type of autocast.
            x_start: float32 [B, C, H, W] in [-1, 1].
            t: int64 [B] in [0, T-1]; 0 is the least noisy.
            noise: float32 [B, C, H, W], standard normal.
            cond: what the network is conditioned on, each [B, ...]; empty without conditioning.

        Returns:
            float32 [B].
        """

    def mean(self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The mean over the images, float32 scalar. The training step calls this."""
        return self(network, x_start, t, noise, cond).mean()

    def output_and_target(
        self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The network's output at x_t and what it is compared with, each float32 [B, C, H, W]."""
        x_t = self.process.q_sample(x_start, t, noise)
        with self._autocast():
            output: Tensor = network(x_t, t, **cond)
        return output.float(), self.prediction.target(x_start, noise, t)


@final
class SimpleLoss(DenoisingLoss):
    """L_simple: the mean over pixels of |target - output|²  (Ho et al. 2020, eq. 14, arXiv:2006.11239)."""

    def __call__(
        self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        output, target = self.output_and_target(network, x_start, t, noise, cond)
        return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)

    def mean(self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The mean over images and pixels, float32 scalar."""
        # One kernel for all images. The mean of the images' means would round differently unless the batch size is a
        # power of two, and runs that began with this kernel must go on with it to end with the same bits.
        return F.mse_loss(*self.output_and_target(network, x_start, t, noise, cond))


LOSSES: dict[str, Callable[[GaussianDiffusion, Prediction, Autocast], DenoisingLoss]] = {"simple": SimpleLoss}
"""The losses by the name that loss.weighting gives them."""

"""The training loss: one number for each image. The training step takes their mean.

To add a weighting, derive a class from WeightedLoss; to add another loss, from DenoisingLoss. Enter it in LOSSES.
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
        min_snr_gamma: γ of the min-SNR weighting, above 0; other losses ignore it.
    """

    def __init__(
        self, process: GaussianDiffusion, prediction: Prediction, autocast: Autocast, min_snr_gamma: float = 5.0
    ) -> None:
        self.process, self.prediction, self._autocast = process, prediction, autocast
        self.min_snr_gamma = min_snr_gamma

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


class WeightedLoss(DenoisingLoss):
    """The simple loss of each image, times a weight of its timestep.

    A weighting says how much an error in x_0 counts. The prediction says how large an error in x_0 an error of the
    output is. So each weighting is one formula for all predictions, and the same weighting with all of them.
    """

    def __init__(
        self, process: GaussianDiffusion, prediction: Prediction, autocast: Autocast, min_snr_gamma: float = 5.0
    ) -> None:
        super().__init__(process, prediction, autocast, min_snr_gamma)
        snr = process.snr.double()
        self.weights = (self.x_start_weights(snr) * prediction.x_start_error(snr)).float()

    @abstractmethod
    def x_start_weights(self, snr: Tensor) -> Tensor:
        """How much a squared error in x_0 counts.

        Args:
            snr: float64 [T], the signal-to-noise ratio ᾱ_t / (1 - ᾱ_t) of each timestep. With zero terminal SNR it is
                0 at T - 1, and so are the weights of both classes below: x_t says nothing about x_0 there.

        Returns:
            float64 [T], at least 0.
        """

    def __call__(
        self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        output, target = self.output_and_target(network, x_start, t, noise, cond)
        return self.weights[t] * F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


@final
class MinSNRLoss(WeightedLoss):
    """An error in x_0 counts min(SNR, γ) (Hang et al. 2023, arXiv:2303.09556).

    So an error of ε counts min(SNR, γ) / SNR, and one of v min(SNR, γ) / (SNR + 1). Timesteps with little noise count
    less than in the loss that the variational bound or ε suggests, since their gradients oppose those of the others.
    """

    def x_start_weights(self, snr: Tensor) -> Tensor:
        """min(SNR, γ)."""
        return snr.clamp(max=self.min_snr_gamma)


@final
class P2Loss(WeightedLoss):
    """An error of ε counts 1 / (1 + SNR) (Choi et al. 2022, arXiv:2204.00227, with k = γ = 1).

    So an error in x_0 counts SNR / (1 + SNR). Timesteps whose noise hides only details that nobody sees count less.
    """

    def x_start_weights(self, snr: Tensor) -> Tensor:
        """SNR / (1 + SNR)."""
        return snr / (1 + snr)


LOSSES: dict[str, Callable[[GaussianDiffusion, Prediction, Autocast, float], DenoisingLoss]] = {
    "simple": SimpleLoss,
    "min_snr": MinSNRLoss,
    "p2": P2Loss,
}
"""The losses by the name that loss.weighting gives them."""

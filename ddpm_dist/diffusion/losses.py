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

from ddpm_dist.diffusion.bound import bound_term
from ddpm_dist.diffusion.predictions import Prediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.variance import FixedLarge, Variance

Autocast = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes the context in which the network's forward pass runs in the chosen number format."""


class DenoisingLoss(ABC):
    """How badly a network denoises each image of a batch.

    Args:
        process: the forward process, with its tables on the device of the batches.
        prediction: what the network's output is compared with.
        autocast: the number format of the network's forward pass; x_t and the loss are float32.
        min_snr_gamma: γ of the min-SNR weighting, above 0; other losses ignore it.
        variance: of the reverse steps; losses without it ignore it.

    Attributes:
        trains_variance: whether the loss reads the whole output of a network that learns its variance. Others are
            given the prediction's part of it alone, by a HybridLoss around them.
    """

    trains_variance = False

    def __init__(
        self,
        process: GaussianDiffusion,
        prediction: Prediction,
        autocast: Autocast,
        min_snr_gamma: float = 5.0,
        variance: Variance | None = None,
    ) -> None:
        self.process, self.prediction, self.autocast = process, prediction, autocast
        self.min_snr_gamma, self.variance = min_snr_gamma, variance or FixedLarge(process)

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
        output = self.output(network, self.process.q_sample(x_start, t, noise), t, cond)
        return output, self.prediction.target(x_start, noise, t)

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The network's output at x_t, float32."""
        with self.autocast():
            output: Tensor = network(x_t, t, **cond)
        return output.float()


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
        self,
        process: GaussianDiffusion,
        prediction: Prediction,
        autocast: Autocast,
        min_snr_gamma: float = 5.0,
        variance: Variance | None = None,
    ) -> None:
        super().__init__(process, prediction, autocast, min_snr_gamma, variance)
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


@final
class VariationalLoss(DenoisingLoss):
    """L_vlb: T times the term of the variational bound at the image's timestep, in bits per dimension.

    Its mean over uniform timesteps is the bound, but for L_T, which nothing learns (Ho et al. 2020, eq. 5). The factor
    T is that of the authors' code for Nichol & Dhariwal 2021, section 3.3 (arXiv:2102.09672).
    """

    trains_variance = True

    def __call__(
        self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        x_t = self.process.q_sample(x_start, t, noise)
        return self.of_output(self.output(network, x_t, t, cond), x_start, x_t, t)

    def of_output(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, *, detach_mean: bool = False
    ) -> Tensor:
        """The loss of each image, by what the network said about x_t.

        Args:
            output: float32 [B, C or 2 C, H, W].
            x_start, x_t: float32 [B, C, H, W].
            t: int64 [B] in [0, T-1].
            detach_mean: whether the prediction counts as constant, so that the variance alone gets a gradient.

        Returns:
            float32 [B].
        """
        part, log_variance = self.variance.split(output, t)
        predicted, _ = self.prediction.to_x_start_and_eps(x_t, t, part.detach() if detach_mean else part)
        return self.process.num_timesteps * bound_term(self.process, x_start, x_t, t, predicted, log_variance)


class _PredictionPart(nn.Module):
    """A network that learns its variance, as a loss sees it that knows nothing of variances: the prediction alone.

    Attributes:
        x_t, output: what the network was asked last, and all that it said, in the type of autocast.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network
        self.x_t: Tensor
        self.output: Tensor

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.x_t, self.output = x_t, self._network(x_t, t, **cond)
        return self.output.chunk(2, dim=1)[0]


@final
class HybridLoss(DenoisingLoss):
    """L_simple + λ L_vlb, where L_vlb teaches the variance alone (Nichol & Dhariwal 2021, eq. 16, arXiv:2102.09672).

    Args:
        simple: the loss of the prediction, of any weighting.
        bound: L_vlb, whose variance is the learned one.
        vlb_weight: λ, above 0. L_vlb is the whole bound: T times the term of the image's timestep, in bits/dim.
    """

    trains_variance = True

    def __init__(self, simple: DenoisingLoss, bound: VariationalLoss, vlb_weight: float) -> None:
        super().__init__(bound.process, bound.prediction, bound.autocast, variance=bound.variance)
        self.simple, self.bound, self.vlb_weight = simple, bound, vlb_weight

    def __call__(
        self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        part = _PredictionPart(network)
        simple = self.simple(part, x_start, t, noise, cond)
        bound = self.bound.of_output(part.output.float(), x_start, part.x_t, t, detach_mean=True)
        return simple + self.vlb_weight * bound


LOSSES: dict[str, Callable[[GaussianDiffusion, Prediction, Autocast, float, Variance], DenoisingLoss]] = {
    "simple": SimpleLoss,
    "min_snr": MinSNRLoss,
    "p2": P2Loss,
    "vlb": VariationalLoss,
}
"""The losses by the name that loss.weighting gives them."""

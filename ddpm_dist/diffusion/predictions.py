"""What the network predicts, and how x_0 and ε are computed from its output.

To add a prediction: write a class with the three methods of `Prediction`, and enter it in PREDICTIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ddpm_dist.diffusion.process import GaussianDiffusion


class Prediction(Protocol):
    """The meaning of the network's output."""

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the output is compared with in training.

        Args:
            x_start: float32 [B, ...] in [-1, 1].
            noise: float32 [B, ...], standard normal; the ε that q_sample was given.
            t: int64 [B] in [0, T-1].

        Returns:
            float32 [B, ...].
        """

    def to_x_start_and_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and the ε that the output stands for; together they make up x_t.

        Args:
            x_t, output: float32 [B, ...].
            t: int64 [B] in [0, T-1].

        Returns:
            x_start and eps, each float32 [B, ...], not clipped.
        """

    def x_start_error(self, snr: Tensor) -> Tensor:
        """The squared error in x_0 that a squared error of 1 in the output stands for; weightings of the loss ask it.

        Args:
            snr: the signal-to-noise ratios ᾱ_t / (1 - ᾱ_t), at least 0; any shape and float type.

        Returns:
            the same shape and type.
        """


class EpsPrediction:
    """The network predicts the noise ε (Ho et al. 2020, section 3.2, arXiv:2006.11239)."""

    def __init__(self, process: GaussianDiffusion) -> None:
        self._process = process

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def to_x_start_and_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 by eq. 4, solved for x_0; ε is the output."""
        return self._process.predict_start_from_eps(x_t, t, output), output

    def x_start_error(self, snr: Tensor) -> Tensor:
        """(1 - ᾱ_t) / ᾱ_t = 1 / SNR."""
        return 1 / snr


class StartPrediction:
    """The network predicts the image x_0 (Ho et al. 2020, section 3.2, who found ε to give better images)."""

    def __init__(self, process: GaussianDiffusion) -> None:
        self._process = process

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The image itself."""
        return x_start

    def to_x_start_and_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 is the output; ε by eq. 4, solved for ε."""
        return output, self._process.predict_eps_from_start(x_t, t, output)

    def x_start_error(self, snr: Tensor) -> Tensor:
        """1: the output is x_0."""
        return torch.ones_like(snr)


class VPrediction:
    """The network predicts v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512).

    Near t = T - 1 the noise is nearly x_t itself, and says little about the image; v is nearly -x_0 there. So the
    large shapes of an image are learned in fewer steps than from ε.
    """

    def __init__(self, process: GaussianDiffusion) -> None:
        self._process = process

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v of this image and this noise."""
        return self._process.predict_v(x_start, t, noise)

    def to_x_start_and_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Both by the inverse of the rotation that makes (x_t, v) of (x_0, ε)."""
        return self._process.predict_start_from_v(x_t, t, output), self._process.predict_eps_from_v(x_t, t, output)

    def x_start_error(self, snr: Tensor) -> Tensor:
        """1 - ᾱ_t = 1 / (SNR + 1)."""
        return 1 / (snr + 1)


PREDICTIONS: dict[str, Callable[[GaussianDiffusion], Prediction]] = {
    "eps": EpsPrediction,
    "x0": StartPrediction,
    "v": VPrediction,
}
"""The predictions by the name that diffusion.prediction gives them."""

"""Classifier-free guidance: how strongly a label shapes an image is chosen when the image is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guided:
    """A network whose output is u + w (c - u): c for the labels that are asked for, u for the null label.

    Ho & Salimans 2022, eq. 6 (arXiv:2207.12598); their w is ours minus 1. With w = 0 this is u, with w = 1 it is c, and
    beyond 1 it goes further away from u than c does. The images then show their class more clearly, and vary less.

    It makes no difference whether ε, x_0 or v is guided: for a given x_t and t, each of them is an affine function of
    each other one, and the factors w and 1 - w add up to 1. So the network's output is guided, whatever it means, and
    before x_0 is clipped. Further channels, in which a network gives its variance, are those of c, or with w = 0 those
    of u.

    Attributes:
        network: (x_t, t, labels=...) -> its output.
        null_label: the label of no class in particular, on which the network was trained too.
        scale: w, at least 0.
        interval: the first and the last timestep that are guided; at others the output is c. None for all timesteps.
            Much noise is better left alone, and so is little (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    """

    network: Callable[..., Tensor]
    null_label: int
    scale: float = 1.0
    interval: Sequence[int] | None = None

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The guided output. The network is called once, with one or with two halves of a batch.

        Args:
            x_t: float32 [B, C, ...].
            t: int64 [B] in [0, T-1].
            labels: int64 [B] in [0, null_label].

        Returns:
            [B, C, ...] or [B, 2 C, ...], as the network's.
        """
        if self.scale == 1.0:
            return self.network(x_t, t, labels=labels)
        guided = self._is_guided(t)
        if not guided.any():
            return self.network(x_t, t, labels=labels)
        nothing = torch.full_like(labels, self.null_label)
        if self.scale == 0.0 and guided.all():
            return self.network(x_t, t, labels=nothing)
        both = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels=torch.cat([labels, nothing])).float()
        c, u = both.chunk(2)
        channels = x_t.shape[1]
        scale = torch.where(guided, self.scale, 1.0).to(both).view(-1, *[1] * (x_t.dim() - 1))
        mixed = u[:, :channels] + scale * (c[:, :channels] - u[:, :channels])
        return torch.cat([mixed, c[:, channels:]], dim=1)

    def _is_guided(self, t: Tensor) -> Tensor:
        """bool [B]: whether the timestep of each image lies in the interval."""
        if self.interval is None:
            return torch.ones(len(t), dtype=torch.bool)  # on the CPU, so that nobody waits for a device
        first, last = self.interval
        return ((first <= t) & (t <= last)).cpu()

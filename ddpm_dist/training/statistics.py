"""Means over the steps between two lines of metrics.jsonl, gathered without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist.parallel.ranks import Ranks


@dataclass(frozen=True)
class WindowMeans:
    """Means over ranks and steps since the last line of metrics.jsonl.

    Attributes:
        loss, grad_norm: of the steps whose update was applied, NaN if there were none; the norm before clipping.
        skipped: updates that were left out, because a gradient was NaN or inf.
        most_in_a_row: the longest series of such updates that was not over before the window.
    """

    loss: float
    grad_norm: float
    skipped: int
    most_in_a_row: int


class Statistics:
    """Sums since the last line. They stay on the device, since reading them would make it wait."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # Of this rank: loss, gradient norm, applied updates.
        self._sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        # The same on every rank: skipped updates, how many in a row now, most in a row.
        self._skips = torch.zeros(3, dtype=torch.float64, device=ranks.device)

    def count(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Add a step.

        Args:
            loss: this rank's part of the step's loss, float64 scalar; the parts of all ranks add up to it.
            grad_norm: float32 scalar, the same on every rank; not finite where the update was left out.
        """
        applied = torch.isfinite(grad_norm)
        # A rank's part, so that the sum over ranks weighs every step alike, however many ranks there were.
        same_everywhere = torch.stack([grad_norm.double(), torch.ones_like(loss)]) / self._ranks.world_size
        self._sums += torch.where(applied, torch.cat([loss[None], same_everywhere]), 0)
        in_a_row = torch.where(applied, 0, self._skips[1] + 1)
        self._skips[0] += ~applied
        self._skips[1] = in_a_row
        self._skips[2] = torch.maximum(self._skips[2], in_a_row)

    def take_means(self) -> WindowMeans:
        """Means since the last call, and start afresh. Waits for the device. Collective."""
        loss, grad_norm, applied = self._ranks.sum(self._sums).tolist()
        skipped, in_a_row, most = (int(count) for count in self._skips.tolist())
        self._sums.zero_()
        self._skips.copy_(torch.tensor([0, in_a_row, in_a_row]))
        applied = applied or math.nan
        return WindowMeans(loss / applied, grad_norm / applied, skipped, most)

    def window(self) -> Tensor:
        """The sums so far, float64 [6] on the CPU, for a checkpoint; the curve then has no seam. Collective.

        From here on rank 0 holds the sums of all ranks.
        """
        self._ranks.sum(self._sums)
        if not self._ranks.is_zero:
            self._sums.zero_()
        return torch.cat([self._sums, self._skips]).cpu()

    def load_window(self, window: Tensor) -> None:
        """Take over what `window` returned, on any number of ranks."""
        if self._ranks.is_zero:
            self._sums.copy_(window[:3])
        self._skips.copy_(window[3:])

"""Means over the steps between two lines of metrics.jsonl, counted without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist.parallel.ranks import Ranks


@dataclass(frozen=True)
class WindowMeans:
    """What the steps since the last line of metrics.jsonl came to, over all ranks.

    Attributes:
        loss: mean over the steps whose update was applied; NaN if there were none.
        grad_norm: mean global gradient norm before clipping, over the same steps; NaN if there were none.
        skipped: number of updates that were left out because a gradient was NaN or inf.
        most_in_a_row: length of the longest series of such updates. A series that began before the last line counts
            with its whole length if it went on after it.
    """

    loss: float
    grad_norm: float
    skipped: int
    most_in_a_row: int


class Statistics:
    """Sums over the steps since the last line. They stay on the device, since to read them is to wait for it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # Of this rank: loss, gradient norm, applied updates.
        self._sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        # The same on every rank: skipped updates, how many in a row now, most in a row.
        self._skips = torch.zeros(3, dtype=torch.float64, device=ranks.device)

    def count(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Add a step.

        Args:
            loss: this rank's part of the step's loss, float64 scalar; the parts of all ranks add up to the loss.
            grad_norm: float32 scalar, the same on every rank; not finite if the update was left out.
        """
        applied = torch.isfinite(grad_norm)
        # Each rank adds 1/W of these. Their sum over the W ranks then counts each step once, on any number of ranks.
        same_everywhere = torch.stack([grad_norm.double(), torch.ones_like(loss)]) / self._ranks.world_size
        self._sums += torch.where(applied, torch.cat([loss[None], same_everywhere]), 0)
        in_a_row = torch.where(applied, 0, self._skips[1] + 1)
        self._skips[0] += ~applied
        self._skips[1] = in_a_row
        self._skips[2] = torch.maximum(self._skips[2], in_a_row)

    def take_means(self) -> WindowMeans:
        """The means since the last call; the sums start at 0 again. Waits for the device. Collective."""
        loss, grad_norm, applied = self._ranks.sum(self._sums).tolist()
        skipped, in_a_row, most = (int(count) for count in self._skips.tolist())
        self._sums.zero_()
        self._skips.copy_(torch.tensor([0, in_a_row, in_a_row]))
        applied = applied or math.nan
        return WindowMeans(loss / applied, grad_norm / applied, skipped, most)

    def window(self) -> Tensor:
        """The sums so far, float64 [6] on the CPU, for a checkpoint. Waits for the device. Collective.

        With them, the first line after a resume counts the steps before the checkpoint too. From here on rank 0 holds
        the sums of all ranks, and the other ranks hold 0.
        """
        self._ranks.sum(self._sums)
        if not self._ranks.is_zero:
            self._sums.zero_()
        return torch.cat([self._sums, self._skips]).cpu()

    def load_window(self, window: Tensor) -> None:
        """Go on from the sums that `window` returned. The number of ranks may have changed."""
        if self._ranks.is_zero:
            self._sums.copy_(window[:3])
        self._skips.copy_(window[3:])

"""Moving averages of the weights, from which samples are drawn."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ddpm_dist.models.reconstruction import exponent_of


class Average:
    """θ̄ <- d θ̄ + (1 - d) θ after each step, with a decay d that its kinds say as a function of the step.

    Args:
        model: the bare module; its state_dict has the same keys as the average's.

    Attributes:
        model: a copy of the module in evaluation mode, with the averaged weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs: tuple[list[Tensor], list[Tensor]] = (
            list(self.model.parameters()),
            [parameter.detach() for parameter in model.parameters()],
        )

    def decay_at(self, step: int) -> float:
        """d of the update that follows the given step.

        Args:
            step: s, the number of finished steps before the one that has just changed the weights; from 0.
        """
        raise NotImplementedError

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's weights.

        Args:
            step: as in `decay_at`.
        """
        averages, weights = self._pairs
        torch._foreach_lerp_(averages, weights, 1 - self.decay_at(step))

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the names of the model's."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the averaged weights by those that `state_dict` returned."""
        self.model.load_state_dict(state)


class EMA(Average):
    """The exponential moving average, with d = min(decay, (1 + s) / (10 + s)) at step s.

    While s is small, d is small, so that the average soon forgets the random weights of step 0. s is the step of the
    run, so that nothing but the weights has to be saved.

    Args:
        model: as for `Average`.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    def decay_at(self, step: int) -> float:
        """As for `Average`."""
        return min(self.decay, (1 + step) / (10 + step))


class PowerEMA(Average):
    """The power-function average, in which the weights of step n count in proportion to n^γ.

    d = (1 - 1/n)^(γ + 1) for the update that makes the n-th step: Karras et al. 2024, eq. 3 (arXiv:2312.02696). The
    first update forgets the random weights of step 0. The average stays as wide in proportion to the steps done, so
    that averages of other widths can be computed afterwards from a few stored ones (`models/reconstruction.py`).

    Args:
        model: as for `Average`.
        width: σ_rel, the standard deviation of the profile n^γ in units of the steps done; in (0, 0.2887].
    """

    def __init__(self, model: nn.Module, width: float) -> None:
        super().__init__(model)
        self._exponent = exponent_of(width)

    def decay_at(self, step: int) -> float:
        """As for `Average`."""
        return float((1 - 1 / (step + 1)) ** (self._exponent + 1))

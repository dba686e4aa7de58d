"""Moving averages of the weights, from which samples are drawn."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """θ̄ <- d θ̄ + (1 - d) θ after each step, with d = min(decay, (1 + s) / (10 + s)) at step s.

    While s is small, d is small, so that the average soon forgets the random weights of step 0. s is the step of the
    run, so that nothing but the weights has to be saved.

    Args:
        model: the bare module; its state_dict has the same keys as the average's.
        decay: in [0, 1).

    Attributes:
        model: a copy of the module in evaluation mode, with the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs: tuple[list[Tensor], list[Tensor]] = (
            list(self.model.parameters()),
            [parameter.detach() for parameter in model.parameters()],
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's weights.

        Args:
            step: s, the number of finished steps before the one that has just changed the weights; from 0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = self._pairs
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the names of the model's."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the averaged weights by those that `state_dict` returned."""
        self.model.load_state_dict(state)

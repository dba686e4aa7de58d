"""One update of the weights, from the gradients of the whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.parallel.reduction import Reduction


class Update:
    """Unscales and clips the gradients, updates the weights, and clears the gradients.

    fp32, bf16 and fp16 run the same lines: the scaler is disabled for the first two.

    Args:
        parameters: all parameters of the network.
        optimizer: updates these parameters.
        scaler: of the loss; disabled unless the precision is fp16.
        rate: finished steps -> the learning rate of the next update.
        grad_clip: the largest global gradient norm; None leaves gradients as they are.
        reduction: prepares gradients for the sum of their squares.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        rate: Callable[[int], float],
        grad_clip: float | None,
        reduction: Reduction,
    ) -> None:
        self._parameters = list(parameters)
        self._optimizer, self._scaler, self._rate = optimizer, scaler, rate
        self._grad_clip, self._reduction = grad_clip, reduction
        self._is_fused = bool(optimizer.param_groups[0].get("fused"))

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on: multiplied by the scaler's factor for fp16, unchanged otherwise."""
        return self._scaler.scale(loss)

    def apply(self, step: int) -> Tensor:
        """Update the weights, unless a gradient is NaN or inf.

        All ranks hold the same gradients, so they all decide alike. Nothing here waits for the device, unless
        optim.fused is off.

        Args:
            step: finished steps before this update.

        Returns:
            the global gradient norm before clipping, float32 scalar; not finite if the update was left out.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        self._scaler.unscale_(self._optimizer)
        grad_norm = self._clip()  # after unscale_: scaled gradients are thousands of times too large to compare
        self._step_unless_infinite(grad_norm)
        self._scaler.update()
        self.zero_grad()
        return grad_norm

    def _clip(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(self._reduction.for_norm(gradients))
        if self._grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._grad_clip, norm)
        return norm

    def _step_unless_infinite(self, grad_norm: Tensor) -> None:
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
        elif self._is_fused:
            self._optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
            self._optimizer.step()
        elif torch.isfinite(grad_norm):  # waits for the device, which the fused kernel above does not
            self._optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self._optimizer.zero_grad()

    def state_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The states of the optimizer and of the scaler."""
        return self._optimizer.state_dict(), self._scaler.state_dict()

    def load_state_dicts(self, optimizer: dict[str, Any], scaler: dict[str, Any]) -> None:
        """Go on from the states that `state_dicts` returned."""
        self._optimizer.load_state_dict(optimizer)
        self._scaler.load_state_dict(scaler)

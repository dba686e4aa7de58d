"""One update of the weights, from gradients that are complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.parallel.reduction import Reduction


class Update:
    """Unscale, clip, step, zero: the same lines for fp32, bf16 and fp16, whose scaler is disabled where not needed.

    Args:
        parameters: all of the network's.
        optimizer: over them.
        scaler: of the loss; disabled unless fp16.
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
        """The loss to call backward on."""
        return self._scaler.scale(loss)

    def apply(self, step: int) -> Tensor:
        """Update the weights, unless a gradient is NaN or inf. Nothing here waits for the device.

        All ranks hold the same gradients, so they all decide alike.

        Args:
            step: finished steps.

        Returns:
            the global gradient norm before clipping, float32 scalar; not finite where the update was left out.
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
        elif torch.isfinite(grad_norm):  # this waits for the device; the fused kernel does not
            self._optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def state_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the optimizer and of the scaler."""
        return self._optimizer.state_dict(), self._scaler.state_dict()

    def load_state_dicts(self, optimizer: dict[str, Any], scaler: dict[str, Any]) -> None:
        """Take over what `state_dicts` returned."""
        self._optimizer.load_state_dict(optimizer)
        self._scaler.load_state_dict(scaler)

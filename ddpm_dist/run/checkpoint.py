"""What a checkpoint is: all that a run needs to go on, as one typed object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_dist.config import from_flat
from ddpm_dist.errors import ConfigError, DataError, Diverged
from ddpm_dist.run.formats import FOREIGN, FORMAT, USE_ANOTHER_VERSION, Values


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on. Random generators are not here: randomness is derived from the step.

    A field with a default is optional: it is left out of the file where it is empty, and older files lack it.

    Attributes:
        step: finished steps; fixes learning rate, data position and noise.
        model, ema, optimizer, scaler: state dicts.
        window: float64 [6], sums and counts since the last line of metrics.jsonl.
        config: {dotted key: value}, resolved.
        contract: what was decided once, at step 0, and binds every later attempt.
        format: which layout this is (see run.formats).
        averages: state dicts of further averages of the weights, by name.
    """

    step: int
    model: dict[str, Any]
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    window: torch.Tensor
    config: dict[str, Any]
    contract: dict[str, Any]
    format: int = FORMAT
    averages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def to_values(self) -> Values:
        """The plain dict that is written to the file."""
        return {name: value for name, value in vars(self).items() if name not in _OPTIONAL or value}

    @classmethod
    def from_values(cls, values: Values) -> Checkpoint:
        """The opposite of `to_values`.

        Raises:
            DataError: the values are not those of a checkpoint, or this version does not know all of them.
        """
        if not set(values) >= _REQUIRED:
            raise DataError(FOREIGN)
        if unknown := sorted(map(str, set(values) - _REQUIRED - _OPTIONAL)):
            raise DataError(f"holds {', '.join(unknown)}, which this version does not know; {USE_ANOTHER_VERSION}")
        try:
            from_flat(values["config"])
        except ConfigError as error:
            raise DataError(f"its config has an {error}; {USE_ANOTHER_VERSION}") from None
        return cls(**values)

    def refuse_infinite(self) -> None:
        """Raises Diverged if a weight or its average is not a finite number; such a checkpoint is of no use."""
        for part, state in {"model": self.model, "ema": self.ema, **self.averages}.items():
            for name, tensor in state.items():
                if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
                    continue  # a finite sum has finite terms, and takes a tenth of the time to look at
                if not torch.isfinite(tensor).all():
                    raise Diverged(f"step {self.step}: {part}.{name} holds NaN or inf; such weights are never saved")


def _has_default(item: dataclasses.Field[Any]) -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


_OPTIONAL = {item.name for item in dataclasses.fields(Checkpoint) if _has_default(item)} - {"format"}
_REQUIRED = {item.name for item in dataclasses.fields(Checkpoint)} - _OPTIONAL

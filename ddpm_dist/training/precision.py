"""Number formats, and other choices for speed that change the bits. They are made once, at step 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddpm_dist.config import TrainConfig

_AUTOCAST_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Numerics:
    """What `auto` was resolved to at step 0. Each checkpoint keeps it, and every later attempt obeys it.

    Attributes:
        precision: number format of the forward pass under autocast: fp32, bf16 or fp16.
        compile: whether torch.compile makes the training forward.
        channels_last: whether weights and images lie in the NHWC memory format.
    """

    precision: str
    compile: bool
    channels_last: bool

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which a forward pass runs in this precision; it changes nothing for fp32."""
        enabled = self.precision != "fp32"
        return torch.autocast(device.type, _AUTOCAST_TYPES[self.precision] if enabled else None, enabled=enabled)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """A loss scaler. It is disabled unless the precision is fp16, so that the training step has one path."""
        return torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")


def resolve(train: TrainConfig, device: torch.device) -> Numerics:
    """Decide what the config leaves to `auto`, for this device."""
    precision = _fast_precision(device) if train.precision == "auto" else train.precision
    # On a CPU, benchmarks/step.py shows NHWC to be faster in fp32 and slower in bf16. On CUDA it is not measured yet.
    nhwc = device.type == "cpu" and precision == "fp32"
    return Numerics(
        precision=precision,
        compile=train.compile == "true",
        channels_last=nhwc if train.channels_last == "auto" else train.channels_last == "true",
    )


def _fast_precision(device: torch.device) -> str:
    """bf16 if the hardware multiplies it natively, fp16 on older GPUs, fp32 on other CPUs."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"

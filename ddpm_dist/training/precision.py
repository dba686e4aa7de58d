"""Number formats and other choices about speed that change the bits: made once, at step 0."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ddpm_dist.config import TrainConfig

_AUTOCAST_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Numerics:
    """What `auto` was resolved to. It is kept in the checkpoint and obeyed by every later attempt.

    Attributes:
        precision: fp32, bf16 or fp16, of the forward pass under autocast.
        compile: torch.compile for the training forward.
        channels_last: NHWC memory format.
    """

    precision: str
    compile: bool
    channels_last: bool

    def autocast(self, device: torch.device) -> torch.autocast:
        enabled = self.precision != "fp32"
        return torch.autocast(device.type, _AUTOCAST_TYPES[self.precision] if enabled else None, enabled=enabled)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Disabled unless fp16, so that the training step has one path."""
        return torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")


def resolve(train: TrainConfig, device: torch.device) -> Numerics:
    """Decide what the config leaves to `auto`."""
    precision = _fast_precision(device) if train.precision == "auto" else train.precision
    # benchmarks/step.py: NHWC gains in fp32 and loses in bf16 on a CPU; on CUDA nobody has measured it here.
    nhwc = device.type == "cpu" and precision == "fp32"
    return Numerics(
        precision=precision,
        compile=train.compile == "true",
        channels_last=nhwc if train.channels_last == "auto" else train.channels_last == "true",
    )


def _fast_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it natively; fp16 on older GPUs; else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"


def configure_backends(train: TrainConfig, threads: int, bitwise: bool = False) -> None:
    """Process-wide switches: thread count, TF32, and no kernel choice by timing (it would differ between lives)."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(train.matmul_precision)
    torch.backends.cudnn.allow_tf32 = train.matmul_precision != "highest"
    torch.backends.cudnn.benchmark = False
    if bitwise and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it did not write

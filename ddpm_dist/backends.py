"""Switches of torch for this process that change speed and bits: CPU threads, TF32, and determinism."""

from __future__ import annotations

import os

import torch

from ddpm_dist.config import TrainConfig


def configure_backends(train: TrainConfig, threads: int, bitwise: bool = False) -> None:
    """Set the switches of this process: number of CPU threads, TF32, and determinism.

    cuDNN must not choose kernels by timing them: attempts would choose differently, and round differently.

    Args:
        threads: CPU threads of this process.
        bitwise: allow only kernels that give the same bits each time; to be set before CUDA is first used.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(train.matmul_precision)
    torch.backends.cudnn.allow_tf32 = train.matmul_precision != "highest"
    torch.backends.cudnn.benchmark = False
    if bitwise and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory takes time and is of no use: nothing here reads memory that it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

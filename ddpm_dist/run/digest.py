"""Digests of what a checkpoint holds: two checkpoints with the same digests go on alike, to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.run.checkpoint import Checkpoint


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """{part: 16 hex digits} of all that is learned or shapes the next step: weights, EMA, optimizer, scaler.

    Neither the memory layout of a tensor nor the order of the keys of a dict counts.
    """
    parts = {
        "weights": checkpoint.model,
        "ema": [checkpoint.ema, checkpoint.averages],
        "optimizer": checkpoint.optimizer,
        "scaler": [checkpoint.step, checkpoint.scaler],
    }
    return {name: _digest(value) for name, value in parts.items()}


def _digest(value: Any) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: hashlib.blake2b, value: Any) -> None:
    """Hash type, size and content of every leaf, so that no two different states are fed alike."""
    if isinstance(value, Tensor):
        hasher.update(b"tensor")
        hasher.update(repr((value.dtype, tuple(value.shape))).encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=repr):
            hasher.update(f"{key!r}:".encode())
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(f"sequence {len(value)};".encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(f"{type(value).__name__} {value!r};".encode())

"""Derived randomness: every random number is a function of (seed, step, shard) or the like, never of earlier draws.

Nothing about random generators is ever saved, so nothing about them can be forgotten on resume.
"""

from __future__ import annotations

import hashlib
import json

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from any parts; the same on every machine and Python version."""
    text = json.dumps(parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own, seeded by the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_default_generators(device: torch.device, *parts: int | str) -> None:
    """Seed the generators that dropout draws from: the CPU's and the device's.

    `torch.manual_seed` would do the same at a hundred times the cost: it visits every backend.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)

"""Derived randomness: a random number depends on (seed, step, shard) or the like, and never on earlier draws.

So no state of a random generator has to be saved, and a resumed run draws the same numbers.
"""

from __future__ import annotations

import hashlib
import json

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that follows from the parts, on every machine and with every version of Python."""
    text = json.dumps(parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A new generator on the CPU, seeded by the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_default_generators(device: torch.device, *parts: int | str) -> None:
    """Seed the generators that dropout draws from: the CPU's and the device's.

    `torch.manual_seed` would do the same, but takes a hundred times as long, since it seeds every backend.

    Args:
        device: the device of this rank; a CUDA device has an index.
        parts: what the seed follows from.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)

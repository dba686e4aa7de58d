"""Images from a denoiser: the same for the same seed, whatever the number asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ddpm_dist.diffusion.gaussian import GaussianDiffusion
from ddpm_dist.diffusion.samplers import Denoiser, ddim_sample, ddpm_sample
from ddpm_dist.randomness import generator

BLOCK_SIZE = 64


def sample_blocks(
    denoiser: Denoiser,
    diffusion: GaussianDiffusion,
    *,
    shape: tuple[int, int, int],
    num: int,
    seed: int,
    sampler: Literal["ddim", "ddpm"],
    steps: int,
    device: torch.device,
    on_step: Callable[[], None],
    block_size: int = BLOCK_SIZE,
) -> Iterator[Tensor]:
    """Images 0 .. num - 1, block by block.

    Noise comes from one generator an image, seeded by (seed, index), and is drawn on the CPU. Convolutions
    depend on the shape of their batch, so the last block is computed whole and cut.

    Args:
        denoiser: (x_t, t) -> predicted noise.
        shape: (C, H, W).
        steps: timesteps that ddim visits; ddpm visits all.
        on_step: called after each timestep of each block; may raise to stop.
        block_size: another size changes images by rounding only.

    Yields:
        uint8 [<= block_size, C, H, W] in [0, 255], on the CPU.
    """
    for first in range(0, num, block_size):
        generators = [generator(seed, "sample", index) for index in range(first, first + block_size)]

        def draw_noise(generators: list[torch.Generator] = generators) -> Tensor:
            return torch.stack([torch.randn(shape, generator=each) for each in generators]).to(device)

        if sampler == "ddim":
            images = ddim_sample(denoiser, diffusion, draw_noise(), steps, on_step=on_step)
        else:
            images = ddpm_sample(denoiser, diffusion, draw_noise(), draw_noise, on_step=on_step)
        yield to_uint8(images)[: num - first].cpu()


def num_model_calls(num: int, sampler: str, steps: int, num_timesteps: int, block_size: int = BLOCK_SIZE) -> int:
    """How often `on_step` will be called: for progress bars."""
    return -(-num // block_size) * (steps if sampler == "ddim" else num_timesteps)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 in [0, 255], rounded to the nearest grey level."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

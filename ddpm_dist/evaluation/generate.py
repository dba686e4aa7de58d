"""Images from a denoiser: the same for the same seed, however many are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddpm_dist.diffusion.pixels import to_uint8
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import Denoise, Sampler
from ddpm_dist.randomness import generator

BLOCK_SIZE = 64


def generate_blocks(
    denoiser: Denoise,
    process: GaussianDiffusion,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int],
    num: int,
    seed: int,
    steps: int,
    device: torch.device,
    on_step: Callable[[], None],
    block_size: int = BLOCK_SIZE,
) -> Iterator[Tensor]:
    """Images 0 .. num - 1, block by block.

    The noise of each image comes from a generator of its own, seeded by (seed, index), and is drawn on the CPU. The
    last block is computed whole and then cut, since the result of a convolution depends on the shape of its batch.

    Args:
        denoiser: (x_t, t) -> (x_start, eps).
        shape: (C, H, W).
        steps: timesteps to visit, for samplers that let one choose.
        on_step: called after each timestep of each block; may raise to stop.
        block_size: another size changes images by rounding only.

    Yields:
        uint8 [<= block_size, C, H, W] in [0, 255], on the CPU.
    """
    for first in range(0, num, block_size):
        generators = [generator(seed, "sample", index) for index in range(first, first + block_size)]

        def draw_noise(generators: list[torch.Generator] = generators) -> Tensor:
            return torch.stack([torch.randn(shape, generator=each) for each in generators]).to(device)

        images = sampler.sample(denoiser, process, draw_noise(), draw_noise, steps, on_step)
        yield to_uint8(images)[: num - first].cpu()


def num_model_calls(num: int, sampler: Sampler, steps: int, num_timesteps: int, block_size: int = BLOCK_SIZE) -> int:
    """How often `on_step` will be called, for progress bars."""
    return -(-num // block_size) * sampler.num_calls(steps, num_timesteps)

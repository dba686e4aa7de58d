"""Images from a denoiser. The same seed gives the same images, whatever the number asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise, Denoiser
from ddpm_dist.diffusion.pixels import to_uint8
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import Sampler, SamplerOptions
from ddpm_dist.errors import DataError
from ddpm_dist.evaluation.classes import Classes
from ddpm_dist.randomness import generator

BLOCK_SIZE = 64
"""Images that are drawn together."""


def generate_block(
    denoiser: Denoise,
    process: GaussianDiffusion,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int],
    first: int,
    seed: int,
    options: SamplerOptions,
    device: torch.device,
    on_step: Callable[[], None],
    block_size: int = BLOCK_SIZE,
    classes: Classes | None = None,
) -> Tensor:
    """Draw the images first .. first + block_size - 1 together.

    The noise of each image comes from a generator of its own, seeded by (seed, index), and is drawn on the CPU. All
    images of a block are always computed, however few are wanted, since the rounding of a convolution depends on the
    size of its batch.

    Args:
        denoiser: (x_t, t) -> Denoised, on the device.
        process: the forward process, with its tables on the device.
        sampler: turns noise into images.
        shape: (C, H, W) of one image.
        first: index of the first image, a multiple of block_size.
        seed: at least 0.
        options: what the user chose about the sampler.
        device: where the images are computed.
        on_step: called after each call of the denoiser; may raise to stop.
        block_size: images of one batch. Another size changes the images by rounding only.
        classes: of which class each image is to be, for a Denoiser whose network has labels.

    Returns:
        uint8 [block_size, C, H, W] in [0, 255], on the CPU.

    Raises:
        DataError: the images are not finite, which would be drawn in black.
    """
    assert first % block_size == 0, "blocks are aligned to the index of the image"
    generators = [generator(seed, "sample", index) for index in range(first, first + block_size)]

    def draw_noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=each) for each in generators]).to(device)

    if classes is not None:
        assert isinstance(denoiser, Denoiser)
        labels = classes.labels(range(first, first + block_size)).to(device)
        denoiser = dataclasses.replace(denoiser, cond={"labels": labels})
    images = sampler.sample(denoiser, process, draw_noise(), draw_noise, options, on_step)
    if not bool(torch.isfinite(images).all()):
        raise DataError(
            f"images {first} to {first + block_size - 1}: not all numbers in them are finite: the network gives NaN or "
            "inf, or the sampler diverges; try the sampler ddim with its defaults, and if that fails an earlier "
            "checkpoint"
        )
    return to_uint8(images).cpu()


def generate_blocks(
    denoiser: Denoise,
    process: GaussianDiffusion,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int],
    num: int,
    seed: int,
    options: SamplerOptions,
    device: torch.device,
    on_step: Callable[[], None],
    block_size: int = BLOCK_SIZE,
    classes: Classes | None = None,
) -> Iterator[Tensor]:
    """Draw the images 0 .. num - 1, block by block.

    Args:
        num: number of images, at least 0.
        denoiser, process, sampler, shape, seed, options, device, on_step, block_size, classes: those of
            `generate_block`.

    Yields:
        uint8 [<= block_size, C, H, W] in [0, 255], on the CPU; the last block is cut.

    Raises:
        DataError: images are not finite.
    """
    for first in range(0, num, block_size):
        block = generate_block(
            denoiser,
            process,
            sampler,
            shape=shape,
            first=first,
            seed=seed,
            options=options,
            device=device,
            on_step=on_step,
            block_size=block_size,
            classes=classes,
        )
        yield block[: num - first]


def num_model_calls(
    num: int, sampler: Sampler, options: SamplerOptions, process: GaussianDiffusion, block_size: int = BLOCK_SIZE
) -> int:
    """How often `generate_blocks` calls `on_step`, for progress bars.

    Args:
        options: what the user chose about the sampler.
        process: the forward process.
    """
    return -(-num // block_size) * sampler.num_calls(options, process)

"""The same seed gives the same images, however many are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.pixels import from_uint8, to_uint8
from ddpm_dist.diffusion.predictions import EpsPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS as TABLE
from ddpm_dist.diffusion.samplers import SamplerOptions
from ddpm_dist.diffusion.schedules import linear_betas
from ddpm_dist.errors import DataError
from ddpm_dist.evaluation.generate import generate_blocks, num_model_calls
from ddpm_dist.models.unet import UNet

SAMPLERS = tuple(TABLE)
T, STEPS, BLOCK = 12, 5, 4
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def model() -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(channels=8, time_embed_dim=16).eval()


def generate(model: Callable[[Tensor, Tensor], Tensor], sampler: str, **options: Any) -> Iterator[Tensor]:
    diffusion, chosen = GaussianDiffusion(linear_betas(T)), TABLE[sampler]
    denoiser = Denoiser(model, diffusion, EpsPrediction(diffusion), chosen.clip)
    return generate_blocks(denoiser, diffusion, chosen, **options)


def blocks_of(model: Callable[[Tensor, Tensor], Tensor], **options: Any) -> list[Tensor]:
    arguments: dict[str, Any] = {
        "shape": SHAPE,
        "num": 6,
        "seed": 0,
        "sampler": "ddim",
        "options": SamplerOptions(steps=STEPS),
        "device": torch.device("cpu"),
        "on_step": lambda: None,
        "block_size": BLOCK,
    }
    return list(generate(model, **{**arguments, **options}))


def images_of(model: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Tensor:
    return torch.cat(blocks_of(model, **options))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num", [1, 3, 4, 5, 8, 9])
def test_images_are_the_same_bits_whatever_their_number(model: UNet, sampler: str, num: int) -> None:
    images = images_of(model, sampler=sampler, num=num)
    assert images.shape == (num, *SHAPE)
    assert torch.equal(images, images_of(model, sampler=sampler, num=10)[:num])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_differ_from_each_other_and_are_no_plain_colour(model: UNet, sampler: str) -> None:
    images = images_of(model, sampler=sampler, num=9)
    assert len({image.numpy().tobytes() for image in images}) == 9
    assert all(len(image.unique()) > 10 for image in images)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_seed_gives_other_images(model: UNet, sampler: str) -> None:
    one, other = (images_of(model, sampler=sampler, seed=seed) for seed in (0, 1))
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_ddpm_draws_fresh_noise_at_every_timestep() -> None:
    """One image's generator goes on from step to step: repeated noise would show as equal increments."""
    seen: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    images_of(predict, sampler="ddpm", num=1, options=SamplerOptions())
    diffusion = GaussianDiffusion(linear_betas(T))
    drawn = [
        (after - before * diffusion.sqrt_recip_alphas[t]) / diffusion.sqrt_betas[t]
        for t, before, after in zip(reversed(range(1, T)), seen, seen[1:], strict=False)
    ]
    noises = torch.stack([seen[0], *drawn]).flatten(1)
    assert len(noises) == T
    # Over the 256 elements of a block, independent noises correlate by 1/16 (standard deviation).
    assert (torch.corrcoef(noises) - torch.eye(T)).abs().max() < 5 / 16


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_leaves_the_global_generator_untouched(model: UNet, sampler: str) -> None:
    state = torch.random.get_rng_state()
    images = images_of(model, sampler=sampler)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        assert torch.equal(images_of(model, sampler=sampler), images)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_block_size_changes_images_by_rounding_only(model: UNet, sampler: str) -> None:
    one, other = (images_of(model, sampler=sampler, num=7, block_size=size).int() for size in (4, 7))
    assert (one - other).abs().max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_blocks_are_uint8_of_the_block_size_and_the_last_is_cut(model: UNet, sampler: str) -> None:
    blocks = blocks_of(model, sampler=sampler, num=9, shape=(1, 4, 4))
    assert [tuple(block.shape) for block in blocks] == [(4, 1, 4, 4), (4, 1, 4, 4), (1, 1, 4, 4)]
    assert all(block.dtype == torch.uint8 for block in blocks)


def test_model_always_sees_whole_blocks() -> None:
    sizes: set[int] = set()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        sizes.add(len(x))
        return x

    images_of(predict, num=9)
    assert sizes == {BLOCK}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num", [1, 4, 5])
def test_on_step_is_called_as_often_as_progress_bars_are_told(model: UNet, sampler: str, num: int) -> None:
    calls: list[None] = []
    images_of(model, sampler=sampler, num=num, on_step=lambda: calls.append(None))
    assert len(calls) == num_model_calls(
        num, TABLE[sampler], SamplerOptions(steps=STEPS), GaussianDiffusion(linear_betas(T)), BLOCK
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_raising_on_step_ends_the_sampling(model: UNet, sampler: str) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        images_of(model, sampler=sampler, on_step=stop)


def test_blocks_are_computed_only_when_asked_for(model: UNet) -> None:
    calls: list[None] = []
    blocks = generate(
        model,
        shape=SHAPE,
        num=100 * BLOCK,
        seed=0,
        sampler="ddim",
        options=SamplerOptions(steps=STEPS),
        device=torch.device("cpu"),
        on_step=lambda: calls.append(None),
        block_size=BLOCK,
    )
    next(blocks)
    assert len(calls) == STEPS


def test_to_uint8_meets_both_ends_and_clamps_beyond_them() -> None:
    grey = to_uint8(torch.tensor([-5.0, -1.0, 1.0, 5.0, float("-inf"), float("inf")]))
    assert grey.dtype == torch.uint8
    assert grey.tolist() == [0, 0, 255, 255, 0, 255]


def test_to_uint8_undoes_the_scaling_of_the_images() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert torch.equal(from_uint8(levels), levels.float() / 127.5 - 1)


def test_to_uint8_rounds_to_the_nearest_level() -> None:
    levels = torch.arange(1, 255)
    for offset in (-0.49, -0.2, 0.2, 0.49):
        assert torch.equal(to_uint8((levels + offset) / 127.5 - 1).long(), levels)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_that_are_not_finite_are_refused_and_not_drawn_in_black(sampler: str) -> None:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        """NaN in one pixel of one image, at the last timestep that is visited."""
        noise = torch.zeros_like(x)
        noise[2, 0, 3, 3] = float("nan") if int(t[0]) == 0 else 0.0
        return noise

    with pytest.raises(DataError, match=r"^images 0 to 3: not all numbers .* earlier checkpoint$"):
        images_of(predict, sampler=sampler)

"""The simple loss: its definition, one number an image, and what is float32 whatever autocast does."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from ddpm_dist.diffusion.losses import SimpleLoss
from ddpm_dist.diffusion.predictions import EpsPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas


class Says(nn.Module):
    """A network whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output, self.asked = output, list[tuple[Tensor, Tensor]]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, t))
        return self.output[: len(x)]


def simple_loss() -> SimpleLoss:
    process = GaussianDiffusion(linear_betas(1000))
    return SimpleLoss(process, EpsPrediction(process), contextlib.nullcontext)


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output of the network, x_start, t and noise."""
    generator = torch.Generator().manual_seed(0)
    output, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    x_start = torch.rand(shape, generator=generator) * 2 - 1
    return output, x_start, torch.randint(0, 1000, shape[:1], generator=generator), noise


@pytest.mark.parametrize("shape", [(6, 1, 4, 4), (3, 2, 4, 4)])
def test_loss_is_the_mean_over_all_elements(shape: tuple[int, ...]) -> None:
    output, x_start, t, noise = batch(shape)
    loss = simple_loss().mean(Says(output), x_start, t, noise, {})
    assert loss.shape == ()
    expected = ((output.double() - noise.double()) ** 2).sum() / output.numel()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_loss_of_each_image_is_its_own_mean_and_their_mean_is_the_loss() -> None:
    output, x_start, t, noise = batch((6, 2, 4, 4))
    loss = simple_loss()
    each = loss(Says(output), x_start, t, noise, {})
    expected = (output.double() - noise.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(each.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(each.mean(), loss.mean(Says(output), x_start, t, noise, {}))


def test_loss_of_a_batch_is_the_mean_of_its_equal_parts() -> None:
    """What micro-batches and ranks rely on."""
    output, x_start, t, noise = batch((8, 1, 4, 4))
    loss = simple_loss()
    parts = [
        loss.mean(Says(o), x, part_t, n, {})
        for o, x, part_t, n in zip(*(whole.chunk(4) for whole in (output, x_start, t, noise)), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), loss.mean(Says(output), x_start, t, noise, {}))


def test_network_is_asked_at_x_t_and_t_in_float32() -> None:
    output, x_start, t, noise = batch((4, 1, 4, 4))
    network, loss = Says(output.bfloat16()), simple_loss()
    assert loss.mean(network, x_start, t, noise, {}).dtype == torch.float32
    ((x, asked_t),) = network.asked
    assert torch.equal(x, loss.process.q_sample(x_start, t, noise))
    assert torch.equal(asked_t, t)

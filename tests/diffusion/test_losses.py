"""The losses: their definitions, one number an image, and what is float32 whatever autocast does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_dist.diffusion.losses import LOSSES, DenoisingLoss, SimpleLoss
from ddpm_dist.diffusion.predictions import PREDICTIONS, EpsPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas
from ddpm_dist.diffusion.variance import FixedLarge


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


# Weightings


GAMMA = 3.0
WEIGHTS: dict[tuple[str, str], Callable[[float], float]] = {
    # Hang et al. 2023 (arXiv:2303.09556), as in the training scripts of diffusers
    ("min_snr", "eps"): lambda snr: min(snr, GAMMA) / snr,
    ("min_snr", "x0"): lambda snr: min(snr, GAMMA),
    ("min_snr", "v"): lambda snr: min(snr, GAMMA) / (snr + 1),
    # Choi et al. 2022 (arXiv:2204.00227), with k = gamma = 1
    ("p2", "eps"): lambda snr: 1 / (1 + snr),
    ("p2", "x0"): lambda snr: snr / (1 + snr),
    ("p2", "v"): lambda snr: snr / (1 + snr) ** 2,
}


def weighted(name: str, prediction: str, process: GaussianDiffusion) -> DenoisingLoss:
    return LOSSES[name](process, PREDICTIONS[prediction](process), contextlib.nullcontext, GAMMA, FixedLarge(process))


def test_every_weighting_has_a_formula_for_every_prediction() -> None:
    weightings = set(LOSSES) - {"simple", "vlb"}  # the bound is no weighting; see test_bound.py
    assert set(WEIGHTS) == {(name, prediction) for name in weightings for prediction in PREDICTIONS}


@pytest.mark.parametrize(
    ("name", "prediction", "zero_terminal_snr"),
    [(*pair, False) for pair in WEIGHTS] + [(*pair, True) for pair in WEIGHTS if pair[1] != "eps"],
)
def test_weights_are_those_of_the_paper(name: str, prediction: str, zero_terminal_snr: bool) -> None:
    signal = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    if zero_terminal_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    expected = np.array([WEIGHTS[name, prediction](a / (1 - a)) for a in signal**2])
    output, x_start, _, noise = batch((1000, 1, 2, 2))
    process = GaussianDiffusion(linear_betas(1000), zero_terminal_snr=zero_terminal_snr)
    loss, t = weighted(name, prediction, process), torch.arange(1000)
    each = loss(Says(output), x_start, t, noise, {})
    target = loss.prediction.target(x_start, noise, t)
    mse = (output.double() - target.double()).square().mean(dim=(1, 2, 3)).numpy()
    assert each.dtype == torch.float32
    np.testing.assert_allclose(each.double().numpy(), expected * mse, rtol=1e-5, atol=1e-12)
    assert float(loss.mean(Says(output), x_start, t, noise, {})) == pytest.approx((expected * mse).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["min_snr", "p2"])
def test_a_weighting_is_the_same_whatever_the_network_predicts(name: str) -> None:
    """Networks that say the same about image and noise in other words have the same loss."""
    process = GaussianDiffusion(linear_betas(1000))
    output, x_start, _, noise = batch((50, 1, 4, 4))
    t = torch.arange(20, 520, 10)  # where rounding is not divided by small numbers
    x_t = process.q_sample(x_start, t, noise)
    said = PREDICTIONS["v"](process).to_x_start_and_eps(x_t, t, output)
    losses = [
        weighted(name, prediction, process)(
            Says(PREDICTIONS[prediction](process).target(*said, t)), x_start, t, noise, {}
        )
        for prediction in PREDICTIONS
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=1e-6)

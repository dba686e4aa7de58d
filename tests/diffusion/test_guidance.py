"""Guidance is the formula of Ho & Salimans, in one call of the network, and only where it is asked for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.guidance import Guided
from ddpm_dist.diffusion.predictions import PREDICTIONS
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas
from ddpm_dist.models.unet import UNet

NULL = 3
TIMES = 20


@dataclass
class Recorded:
    """A network with labels that counts its calls; `outs` times as many channels come out as go in."""

    outs: int = 1
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.net = UNet(1, 8, out_channels=self.outs, num_classes=NULL).double().eval()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.sizes.append(len(x))
        output: Tensor = self.net(x.double(), t, labels)
        return output


def inputs(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 1, 8, 8, generator=generator)
    return x, torch.full((size,), 7), torch.arange(size) % NULL


def both(network: Recorded, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the network says for the labels, and of no class in particular, as float32."""
    return network(x, t, labels).float(), network(x, t, torch.full_like(labels, NULL)).float()


def test_scale_0_is_unconditional_and_1_conditional_without_a_second_half() -> None:
    network, (x, t, labels) = Recorded(), inputs()
    c, u = both(network, x, t, labels)
    assert (c - u).abs().max() > 0.1
    for scale, expected in ((0.0, u), (1.0, c)):
        network.sizes.clear()
        torch.testing.assert_close(Guided(network, NULL, scale)(x, t, labels).float(), expected, rtol=0, atol=1e-6)
        assert network.sizes == [4]
        nearby = Guided(network, NULL, scale + 1e-7)(x, t, labels)
        torch.testing.assert_close(nearby, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 2.0, 7.5])
def test_any_other_scale_is_the_formula_in_one_call_of_twice_the_batch(scale: float) -> None:
    network, (x, t, labels) = Recorded(), inputs()
    c, u = both(network, x, t, labels)
    network.sizes.clear()
    w = scale - 1  # as Ho & Salimans count
    torch.testing.assert_close(Guided(network, NULL, scale)(x, t, labels), (1 + w) * c - w * u, rtol=0, atol=1e-5)
    assert network.sizes == [8]


def test_outside_the_interval_nothing_is_guided_and_nothing_computed_twice() -> None:
    network, (x, _, labels) = Recorded(), inputs()
    guided = Guided(network, NULL, 3.0, (5, 9))
    for step in (0, 4, 5, 7, 9, 10, 19):
        t = torch.full((4,), step)
        c, u = both(network, x, t, labels)
        network.sizes.clear()
        is_guided = 5 <= step <= 9
        expected = u + 3 * (c - u) if is_guided else c
        torch.testing.assert_close(guided(x, t, labels).float(), expected, rtol=0, atol=1e-5)
        assert network.sizes == [8 if is_guided else 4]
    mixed = torch.tensor([4, 5, 9, 10])
    c, u = both(network, x, mixed, labels)
    expected = torch.where(torch.tensor([0, 1, 1, 0], dtype=torch.bool)[:, None, None, None], u + 3 * (c - u), c)
    torch.testing.assert_close(guided(x, mixed, labels), expected, rtol=0, atol=1e-5)
    off = replace(guided, scale=0.0)
    expected = torch.where(torch.tensor([0, 1, 1, 0], dtype=torch.bool)[:, None, None, None], u, c)
    torch.testing.assert_close(off(x, mixed, labels), expected, rtol=0, atol=1e-5)


def test_a_learned_variance_is_that_of_the_class() -> None:
    network, (x, t, labels) = Recorded(outs=2), inputs()
    c, u = both(network, x, t, labels)
    output = Guided(network, NULL, 4.0)(x, t, labels)
    torch.testing.assert_close(output[:, :1], u[:, :1] + 4 * (c - u)[:, :1], rtol=0, atol=1e-5)
    torch.testing.assert_close(output[:, 1:], c[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("prediction", "clip"), [*itertools.product(PREDICTIONS, [False, True])])
def test_x_start_and_eps_are_guided_alike_before_anything_is_clipped(prediction: str, clip: bool) -> None:
    network, (x, t, labels) = Recorded(), inputs()
    process = GaussianDiffusion(linear_betas(TIMES))
    kind = PREDICTIONS[prediction](process)

    def denoised(scale: float, clip: bool) -> tuple[Tensor, Tensor]:
        denoiser = Denoiser(Guided(network, NULL, scale), process, kind, clip, cond={"labels": labels})
        return denoiser(x, t)[:2]

    (c_start, c_eps), (u_start, u_eps) = denoised(1.0, False), denoised(0.0, False)
    start, eps = u_start + 3 * (c_start - u_start), u_eps + 3 * (c_eps - u_eps)
    if clip:
        start = start.clamp(-1, 1)
        eps = process.predict_eps_from_start(x, t, start)
    found = denoised(3.0, clip)
    torch.testing.assert_close(found[0], start, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], eps, rtol=1e-4, atol=1e-4)

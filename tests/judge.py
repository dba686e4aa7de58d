"""A judge of drawn digits: a small network that says which digit an image shows, or that it shows none.

It learns from real images that the judged model has not seen, and from images that are made of these and are no
digits: parts of two digits, two digits in one place, noise over a digit, blots. Without these it is sure of noise too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NO_DIGIT = 10  # the last of eleven classes


class Judge:
    """Trained when it is made; the same seed gives the same judge on the same machine.

    Args:
        images: uint8 [N, 1, S, S], real digits.
        labels: int64 [N] in [0, 9].
        epochs: passes over them.
    """

    def __init__(self, images: Tensor, labels: Tensor, epochs: int = 40) -> None:
        self._generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # weights and dropout
            self._network = _network()
            self._train(images.float() / 255, labels, epochs)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 [N, 1, S, S] -> float32 [N, 11]: the ten digits, and no digit."""
        parts = (images.float() / 255).split(250)
        return torch.cat([self._network(part).softmax(1) for part in parts])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [N, 1, S, S] -> float64 [N, 128]: what the last layer decides by."""
        assert isinstance(self._network, nn.Sequential)
        parts = (images.float() / 255).split(250)
        return torch.cat([self._network[:-1](part) for part in parts]).double()

    def _train(self, images: Tensor, labels: Tensor, epochs: int) -> None:
        batch = 50
        optimizer = torch.optim.Adam(self._network.parameters(), lr=2e-3)
        steps = epochs * (len(images) // batch)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            if step % (len(images) // batch) == 0:
                order = torch.randperm(len(images), generator=self._generator).split(batch)
            chosen = order[step % (len(images) // batch)]
            digits = self._moved(images[chosen])
            others = self._no_digits(digits)[: batch // 2]
            target = torch.cat([labels[chosen], torch.full((len(others),), NO_DIGIT)])
            loss = functional.cross_entropy(self._network(torch.cat([digits, others])), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        self._network.eval()

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._generator)

    def _moved(self, images: Tensor) -> Tensor:
        """Each image turned, stretched, sheared and shifted a little."""
        count = len(images)
        angle, scale = self._uniform(-0.2, 0.2, count), self._uniform(0.88, 1.12, count)
        shear, (x, y) = self._uniform(-0.15, 0.15, count), self._uniform(-0.14, 0.14, 2, count)
        rows = [
            torch.stack([angle.cos() * scale, shear - angle.sin() * scale, x], 1),
            torch.stack([angle.sin() * scale, angle.cos() * scale, y], 1),
        ]
        grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, align_corners=False)

    def _no_digits(self, digits: Tensor) -> Tensor:
        """Images of the same shape that show no digit, a third of each kind, in random order."""
        count, size = len(digits), digits.shape[-1]
        half = size // 2
        shuffled = torch.roll(digits, (half, half), dims=(2, 3))  # each quarter in the opposite corner
        noise = torch.randn(digits.shape, generator=self._generator) * self._uniform(0.15, 0.5, count, 1, 1, 1)
        noisy = (digits + noise).clamp(0, 1)
        coarse = self._uniform(-1, 1, count, 1, 5, 5)
        blots = functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
        kinds = torch.stack([shuffled, noisy, blots])
        return kinds[torch.randint(len(kinds), (count,), generator=self._generator), torch.arange(count)]


def _network() -> nn.Module:
    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    features = [*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64)]
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.4), nn.Linear(1024, 128), nn.ReLU()]
    return nn.Sequential(*features, *head, nn.Linear(128, NO_DIGIT + 1))


@dataclass(frozen=True)
class Verdict:
    """What a judge says of many images.

    Attributes:
        sure: the share of images that it is as sure of as of the surest 95 % of real images.
        rarest: the share of the rarest digit.
        entropy: of the shares of the ten digits; 1 if all are equally frequent.
    """

    sure: float
    rarest: float
    entropy: float


def judge_images(judge: Judge, images: Tensor, threshold: float) -> Verdict:
    """The verdict on uint8 [N, 1, S, S].

    Args:
        threshold: the probability of a digit from which on an image counts as one; see `sure_from`.
    """
    digits = judge.probabilities(images)[:, :NO_DIGIT]
    sureness, digit = digits.max(1)
    shares = torch.bincount(digit, minlength=NO_DIGIT).double() / len(images)
    entropy = -torch.special.xlogy(shares, shares).sum().item() / math.log(NO_DIGIT)
    return Verdict((sureness >= threshold).double().mean().item(), shares.min().item(), entropy)


def sure_from(judge: Judge, real: Tensor) -> float:
    """The threshold that 95 % of these real images pass."""
    return judge.probabilities(real)[:, :NO_DIGIT].max(1).values.quantile(0.05).item()

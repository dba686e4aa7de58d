"""How likely a trained network finds images: the variational bound on their negative log-likelihood, in bits/dim.

The same seed gives an image the same timesteps and the same noise, whatever other images are measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.data.images import Images
from ddpm_dist.diffusion.bound import bound_term, prior_term
from ddpm_dist.diffusion.denoiser import Denoise
from ddpm_dist.diffusion.pixels import from_uint8
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.variance import Variance
from ddpm_dist.randomness import generator

BLOCK_SIZE = 64
"""Images that are measured together. Another size changes the figures by rounding only."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images, in bits per dimension.

    Attributes:
        mean: the mean.
        standard_error: how far it may be from the mean over all images like these; None for a single image.
    """

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The estimate from one value an image: float64 [N]."""
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class Likelihood:
    """What the bound is made of (Ho et al. 2020, eq. 5, arXiv:2006.11239). Timesteps count from 0.

    Attributes:
        num_images: over how many images the means are.
        total: the bound, all terms together.
        prior: L_T, what is left of an image when all noise is added.
        divergences: L_1 + ... + L_{T-1}.
        decoding: L_0, the 8-bit pixels from the least noisy x_1.
        groups: (first timestep, last timestep, their part of L_1 + ... + L_{T-1}), in the order of timesteps.
    """

    num_images: int
    total: Estimate
    prior: Estimate
    divergences: Estimate
    decoding: Estimate
    groups: tuple[tuple[int, int, Estimate], ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""

        def plain(estimate: Estimate) -> dict[str, float | None]:
            return {"bits_per_dim": estimate.mean, "standard_error": estimate.standard_error}

        return {
            "num_images": self.num_images,
            **plain(self.total),
            "L_T": plain(self.prior),
            "L_1..L_T-1": plain(self.divergences),
            "L_0": plain(self.decoding),
            "timesteps": [{"first": first, "last": last, **plain(part)} for first, last, part in self.groups],
        }


def groups_of(num_timesteps: int, num_groups: int) -> list[range]:
    """The timesteps 1 .. T-1 in so many groups of neighbours, which are as equal in size as can be.

    Args:
        num_timesteps: T.
        num_groups: 1 .. T-1.
    """
    edges = [1 + (num_timesteps - 1) * group // num_groups for group in range(num_groups + 1)]
    return [range(first, end) for first, end in itertools.pairwise(edges)]


def num_network_calls(num_images: int, num_groups: int) -> int:
    """How often `measure` calls `on_call`, for progress bars."""
    return -(-num_images // BLOCK_SIZE) * (num_groups + 1)


@torch.no_grad()
def measure(
    denoiser: Callable[[Mapping[str, Tensor]], Denoise],
    process: GaussianDiffusion,
    images: Images,
    indices: Sequence[int],
    *,
    variance: Variance | None,
    num_groups: int,
    seed: int,
    device: torch.device,
    on_call: Callable[[], None],
) -> Likelihood:
    """The bound on -log p(x_0) of these images, term by term.

    Of each group of neighbouring timesteps, every image gets one, at random, and its term counts for all of the group:
    the mean is that of all timesteps. With T - 1 groups, nothing is left to chance but the noise. Sums are float64.

    Args:
        denoiser: what the images are conditioned on, each [B, ...] -> (x_t, t) -> Denoised, on the device.
        process: the forward process, with its tables on the device.
        images: the set.
        indices: which of its images.
        variance: a fixed variance of the reverse steps; None for the one that the denoiser says.
        num_groups: of the timesteps 1 .. T-1, from 1 to T-1; the network is called once more, at timestep 0.
        seed: at least 0. The noise of each image comes from a generator of its own, seeded by (seed, index).
        device: where the network computes.
        on_call: called after each call of the network; may raise to stop.
    """
    groups = groups_of(process.num_timesteps, num_groups)
    blocks, priors = [], []
    for first in range(0, len(indices), BLOCK_SIZE):
        block = indices[first : first + BLOCK_SIZE]
        generators = [generator(seed, "likelihood", index) for index in block]
        x_start = from_uint8(images.fetch(block)).to(device)
        denoise = denoiser({name: value.to(device) for name, value in images.conditions(block).items()})
        terms = []
        for group in [range(1), *groups]:
            t = torch.cat([torch.randint(group.start, group.stop, (1,), generator=each) for each in generators])
            noise = torch.stack([torch.randn(images.shape, generator=each) for each in generators])
            term = _term(denoise, process, variance, x_start, t.to(device), noise.to(device))
            terms.append(len(group) * term.cpu())
            on_call()
        blocks.append(torch.stack(terms, dim=1))
        priors.append(prior_term(process, x_start.double()).cpu())
    return _summary(torch.cat(blocks), torch.cat(priors), groups)


def _term(
    denoise: Denoise, process: GaussianDiffusion, variance: Variance | None, x_start: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_t of each image, float64 [B]."""
    x_t = process.q_sample(x_start, t, noise)
    said = denoise(x_t, t)
    log_variance = said.log_variance if variance is None else variance.split(x_t, t)[1]
    assert log_variance is not None, "the caller gives a fixed variance unless the network says one"
    return bound_term(process, x_start.double(), x_t.double(), t, said.x_start.double(), log_variance.double())


def _summary(terms: Tensor, priors: Tensor, groups: Sequence[range]) -> Likelihood:
    """Args: terms: float64 [N, 1 + number of groups], L_0 first; priors: float64 [N]."""
    divergences = terms[:, 1:].sum(1)
    return Likelihood(
        num_images=len(terms),
        total=Estimate.of(priors + terms.sum(1)),
        prior=Estimate.of(priors),
        divergences=Estimate.of(divergences),
        decoding=Estimate.of(terms[:, 0]),
        groups=tuple(
            (group[0], group[-1], Estimate.of(terms[:, column])) for column, group in enumerate(groups, start=1)
        ),
    )

"""The variational bound on the negative log-likelihood of images, term by term, in bits per dimension.

Ho et al. 2020, eq. 5 (arXiv:2006.11239): -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0. The term of timestep t, which
counts from 0, is L_t. A dimension is one channel of one pixel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_dist.diffusion.process import GaussianDiffusion, per_image

HALF_LEVEL = 1 / 255
"""Half the distance of two neighbours among the 256 values of a pixel, in [-1, 1]."""


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """The divergence of one normal distribution from another, KL(N(mean, .) || N(other_mean, .)), of each pixel.

    Args:
        mean, log_variance, other_mean, other_log_variance: of one float type, and of shapes that broadcast.

    Returns:
        nats, at least 0.
    """
    difference = log_variance - other_log_variance
    return 0.5 * (torch.expm1(difference) - difference + (mean - other_mean).square() * torch.exp(-other_log_variance))


def discretized_log_likelihood(x_start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the probability that a normal distribution gives to the level of a pixel (Ho et al. 2020, eq. 13).

    A level is the interval of width 2/255 around it; those of 0 and 255 reach to infinity.

    Args:
        x_start: [B, ...] in [-1, 1], made of whole numbers 0 .. 255.
        mean, log_variance: of the same float type; shapes that broadcast.

    Returns:
        nats, at most 0. It is exact far from the mean too, where the probability itself would be rounded to 0.
    """
    half = HALF_LEVEL * torch.exp(-0.5 * log_variance)
    distance = (x_start - mean) * torch.exp(-0.5 * log_variance)
    # An interval above the mean is as likely as its mirror image below it, where log Φ is exact.
    below = -distance.abs()
    upper, lower = torch.special.log_ndtr(below + half), torch.special.log_ndtr(below - half)
    inside = upper + torch.log(-torch.expm1(lower - upper))
    darkest, brightest = x_start < -1 + HALF_LEVEL, x_start > 1 - HALF_LEVEL
    tail = torch.special.log_ndtr(torch.where(brightest, -distance, distance) + half)
    return torch.where(darkest | brightest, tail, inside)


def bound_term(
    process: GaussianDiffusion, x_start: Tensor, x_t: Tensor, t: Tensor, predicted: Tensor, log_variance: Tensor
) -> Tensor:
    """L_t of each image: how many bits it takes to say x_{t-1} to who knows x_t and the network.

    From timestep 1 on it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at 0 it is -log p(x_0 | x_1) of the 8-bit
    pixels. The mean of p is that of q(x_{t-1} | x_t, x_0) with the predicted x_0.

    Args:
        x_start: [B, C, H, W] in [-1, 1], made of whole numbers 0 .. 255.
        x_t: [B, C, H, W], a draw of q(x_t | x_0).
        t: int64 [B] in [0, T-1]; 0 is the least noisy.
        predicted: [B, C, H, W], the x_0 that the network sees in x_t.
        log_variance: [B, C, H, W] or [B, 1, 1, 1], the natural logarithm of the variance of p.

    Returns:
        bits per dimension, [B], in the float type of x_start.
    """
    mean, _ = process.q_posterior_mean_variance(predicted, x_t, t)
    true_mean, _ = process.q_posterior_mean_variance(x_start, x_t, t)
    true_log_variance = per_image(process.posterior_log_variance_clipped, t, x_t).to(x_start.dtype)
    divergence = _bits_per_dimension(normal_kl(true_mean, true_log_variance, mean, log_variance))
    decoding = -_bits_per_dimension(discretized_log_likelihood(x_start, mean, log_variance))
    return torch.where(t == 0, decoding, divergence)


def prior_term(process: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image: what of it is left when all noise is added. Nothing learns it.

    Args:
        x_start: [B, ...] in [-1, 1].

    Returns:
        bits per dimension, [B], in the float type of x_start.
    """
    signal, sigma = process.sqrt_alphas_cumprod[-1].to(x_start), process.sqrt_one_minus_alphas_cumprod[-1].to(x_start)
    zero = torch.zeros_like(signal)
    return _bits_per_dimension(normal_kl(signal * x_start, 2 * sigma.log(), zero, zero))


def _bits_per_dimension(nats: Tensor) -> Tensor:
    """The mean over all but the first dimension, in bits."""
    return nats.flatten(1).mean(1) / math.log(2)

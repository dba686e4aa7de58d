"""The forward process q and its posterior: tables of one noise schedule, and the formulas that use them.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239). Timesteps count from 0 (the
least noisy, the paper's t = 1) to T - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_dist.diffusion.schedules import rescale_to_zero_terminal_snr


class GaussianDiffusion:
    """One noise schedule, with the formulas of q(x_t | x_0), of its posterior and of the reverse step.

    Tables are made in float64 and cast once to float32, on the given device.

    Args:
        betas: float64 [T] in (0, 1).
        device: where the tables lie; the tensors given to the methods must be there too.
        zero_terminal_snr: whether the betas are rescaled so that ᾱ is 0 at T - 1 (Lin et al. 2024, arXiv:2305.08891).
            Then x_t at T - 1 is the noise itself. There `predict_start_from_eps` and `p_mean`, which divide by
            sqrt(ᾱ_t) and by sqrt(α_t), have no finite value; all other methods have.

    Attributes:
        num_timesteps: T.
        zero_terminal_snr: whether ᾱ is 0 at T - 1.
        exact_alphas_cumprod: ᾱ of each timestep in float64, for samplers, whose formulas are of single numbers.
        betas, alphas_cumprod, ...: the tables, each float32 [T]; entry 0 belongs to the least noisy timestep.

    Raises:
        ValueError: betas are not a 1-D tensor inside (0, 1).
    """

    def __init__(self, betas: Tensor, device: torch.device | str = "cpu", *, zero_terminal_snr: bool = False) -> None:
        if betas.ndim != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas: expected a 1-D tensor inside (0, 1), got shape {tuple(betas.shape)}")
        betas = betas.double()
        self._make_tables(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas, device)

    def _make_tables(self, betas: Tensor, device: torch.device | str) -> None:
        """Fill all attributes. betas: float64 [T] in (0, 1]; only the last may be 1, and then ᾱ ends at 0."""
        alphas = 1.0 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        # At 0 the posterior has no variance, and no logarithm of it: it gets that of timestep 1.
        posterior_variance_clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.num_timesteps = len(betas)
        self.zero_terminal_snr = bool(alphas_cumprod[-1] == 0)
        self.exact_alphas_cumprod: list[float] = alphas_cumprod.tolist()
        self.betas = table(betas)
        self.alphas_cumprod = table(alphas_cumprod)
        self.alphas_cumprod_prev = table(alphas_cumprod_prev)
        self.sqrt_alphas_cumprod = table(alphas_cumprod.sqrt())
        self.sqrt_one_minus_alphas_cumprod = table((1 - alphas_cumprod).sqrt())
        self.snr = table(alphas_cumprod / (1 - alphas_cumprod))
        self.posterior_variance = table(posterior_variance)
        self.posterior_log_variance_clipped = table(posterior_variance_clipped.log())
        self.posterior_mean_coef1 = table(betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod))
        self.posterior_mean_coef2 = table((1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod))
        self.sqrt_betas = table(betas.sqrt())
        self.log_betas = table(betas.log())
        # x_{t-1} = (x_t - beta / sqrt(1 - alphas_cumprod) eps) / sqrt(alpha): the two factors of eq. 11.
        self.sqrt_recip_alphas = table(alphas.rsqrt())
        self.eps_coef = table(betas / ((1 - alphas_cumprod).sqrt() * alphas.sqrt()))

    def respaced(self, timesteps: Sequence[int]) -> GaussianDiffusion:
        """The process that has only these timesteps: β = 1 - ᾱ_t / ᾱ_t' of each and the one t' before it.

        Nichol & Dhariwal 2021, section 4 (arXiv:2102.09672).

        Args:
            timesteps: in [0, T-1], rising, at least one.

        Returns:
            a process on the same device; its timestep i is timesteps[i] of this one.
        """
        if len(timesteps) == self.num_timesteps:
            return self
        alphas_cumprod = torch.tensor([self.exact_alphas_cumprod[t] for t in timesteps], dtype=torch.float64)
        before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        process = object.__new__(GaussianDiffusion)
        process._make_tables(1 - alphas_cumprod / before, self.betas.device)
        return process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε  (eq. 4).

        Args:
            x_start: float32 [B, ...] in [-1, 1].
            t: int64 [B] in [0, T-1]; 0 is the least noisy.
            noise: float32 [B, ...], standard normal.

        Returns:
            float32 [B, ...].
        """
        signal = per_image(self.sqrt_alphas_cumprod, t, x_start)
        return signal * x_start + per_image(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def predict_start_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 = (x_t - sqrt(1 - ᾱ_t) ε) / sqrt(ᾱ_t)  (eq. 4 solved for x_0); not clipped.

        Args:
            x_t, eps: float32 [B, ...].
            t: int64 [B] in [0, T-1]; below T - 1 with zero terminal SNR.

        Returns:
            float32 [B, ...].
        """
        noise = per_image(self.sqrt_one_minus_alphas_cumprod, t, x_t) * eps
        return (x_t - noise) / per_image(self.sqrt_alphas_cumprod, t, x_t)

    def predict_eps_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """ε = (x_t - sqrt(ᾱ_t) x_0) / sqrt(1 - ᾱ_t)  (eq. 4 solved for ε).

        Args:
            x_t, x_start: float32 [B, ...].
            t: int64 [B] in [0, T-1].

        Returns:
            float32 [B, ...].
        """
        signal = per_image(self.sqrt_alphas_cumprod, t, x_t) * x_start
        return (x_t - signal) / per_image(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0  (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

        Args:
            x_start, noise: float32 [B, ...].
            t: int64 [B] in [0, T-1].

        Returns:
            float32 [B, ...].
        """
        signal = per_image(self.sqrt_alphas_cumprod, t, x_start) * noise
        return signal - per_image(self.sqrt_one_minus_alphas_cumprod, t, x_start) * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(ᾱ_t) x_t - sqrt(1 - ᾱ_t) v  (Salimans & Ho 2022, appendix D); not clipped.

        Args:
            x_t, v: float32 [B, ...].
            t: int64 [B] in [0, T-1].

        Returns:
            float32 [B, ...].
        """
        noise = per_image(self.sqrt_one_minus_alphas_cumprod, t, x_t) * v
        return per_image(self.sqrt_alphas_cumprod, t, x_t) * x_t - noise

    def predict_eps_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """ε = sqrt(1 - ᾱ_t) x_t + sqrt(ᾱ_t) v: the other row of the rotation that turns (x_0, ε) into (x_t, v).

        Args:
            x_t, v: float32 [B, ...].
            t: int64 [B] in [0, T-1].

        Returns:
            float32 [B, ...].
        """
        noise = per_image(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t
        return noise + per_image(self.sqrt_alphas_cumprod, t, x_t) * v

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance β̃_t of q(x_{t-1} | x_t, x_0)  (eqs. 6 and 7).

        Args:
            x_start, x_t: float32 [B, ...].
            t: int64 [B] in [0, T-1]; at 0 the variance is 0 and the mean is x_start.

        Returns:
            mean float32 [B, ...]; variance float32 [B, 1, ...], broadcast over each image.
        """
        start = per_image(self.posterior_mean_coef1, t, x_t) * x_start
        mean = start + per_image(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, per_image(self.posterior_variance, t, x_t)

    def p_mean(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """μ_θ = (x_t - β_t / sqrt(1 - ᾱ_t) ε_θ) / sqrt(α_t)  (eq. 11).

        Args:
            x_t, eps: float32 [B, ...].
            t: int64 [B] in [0, T-1]; below T - 1 with zero terminal SNR.

        Returns:
            float32 [B, ...].
        """
        return per_image(self.sqrt_recip_alphas, t, x_t) * x_t - per_image(self.eps_coef, t, x_t) * eps


def per_image(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """table[t] as [B, 1, ..., 1], to broadcast over x."""
    return table[t].view(-1, *[1] * (x.ndim - 1))

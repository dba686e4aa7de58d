"""What all samplers share: their arguments, and what users can choose about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers.spacing import BEGIN_AT_LAST, SPACINGS

DEFAULT_STEPS = 50
Spelled = Callable[[str, object], str]
"""(name, value) -> an option as the user wrote it."""
VARIANCES = ("fixed_large", "fixed_small", "learned")


@dataclass(frozen=True)
class SamplerOptions:
    """What a user can choose about a sampler; None leaves it to the sampler.

    Each sampler has a use for some of these (`Sampler.takes`). The last two are the denoiser's.

    Attributes:
        steps: number of timesteps to visit, 1 .. T.
        spacing: which ones they are, a name in SPACINGS.
        eta: how much noise DDIM adds at each step, 0 .. 1; None is 0, 1 is as much as ancestral sampling does.
        variance: of the noise that ancestral sampling adds: fixed_large is β_t, fixed_small β̃_t, learned what the
            network says. None is learned if the network learns it, and fixed_large otherwise.
        clip: whether x_0 is clipped to [-1, 1] at each step; None is `Sampler.clip`.
        dynamic_threshold: quantile of dynamic thresholding, in (0, 1]; it takes the place of clip.
    """

    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    variance: str | None = None
    clip: bool | None = None
    dynamic_threshold: float | None = None

    def num_steps(self, num_timesteps: int) -> int:
        """The number of timesteps to visit, for samplers that need few: 50 if nothing else is asked for.

        Args:
            num_timesteps: T.
        """
        return min(DEFAULT_STEPS, num_timesteps) if self.steps is None else self.steps

    def timesteps(self, process: GaussianDiffusion, spacing: str = "even") -> list[int]:
        """The timesteps to visit, each in [0, T-1], falling.

        Args:
            process: the forward process.
            spacing: a name in SPACINGS, which is used unless another one was chosen.

        Raises:
            ValueError: steps is not in 1 .. T.
        """
        steps = self.num_steps(process.num_timesteps)
        if not 1 <= steps <= process.num_timesteps:
            raise ValueError(f"steps={steps}: expected 1 .. {process.num_timesteps}")
        return SPACINGS[self.spacing or spacing](process, steps)


NO_OPTIONS = SamplerOptions()


class Sample(Protocol):
    """Turns noise into images."""

    def __call__(
        self,
        denoiser: Denoise,
        process: GaussianDiffusion,
        x_T: Tensor,
        draw_noise: Callable[[], Tensor],
        options: SamplerOptions,
        on_step: Callable[[], None],
    ) -> Tensor:
        """The images.

        Args:
            denoiser: (x_t, t) -> Denoised; it decides whether x_start is clipped.
            process: the forward process, with its tables on x_T's device.
            x_T: float32 [B, ...], standard normal.
            draw_noise: returns fresh standard normal noise of x_T's shape at each call.
            options: what the user chose; a sampler ignores those that it does not take.
            on_step: called after each call of the denoiser; may raise to stop.

        Returns:
            float32 [B, ...].
        """


@dataclass(frozen=True)
class Sampler:
    """A sampler, with the facts that its callers need.

    Attributes:
        sample: turns noise into images.
        num_calls: (options, process) -> how often it calls the denoiser, for progress bars.
        clip: whether the denoiser that it gets should clip x_start, unless the user says.
        takes: the names of the options that it has a use for, besides those of the denoiser.
    """

    sample: Sample
    num_calls: Callable[[SamplerOptions, GaussianDiffusion], int]
    clip: bool
    takes: frozenset[str] = frozenset()

    def clips(self, options: SamplerOptions) -> bool:
        """Whether the denoiser that it gets should clip x_start to [-1, 1]."""
        return self.clip if options.clip is None else options.clip

    def check_taken(self, name: str, options: SamplerOptions, spelled: Spelled) -> None:
        """Check that this sampler has a use for the options that were given. Raises ValueError; see `settle`."""
        for option in ("steps", "spacing", "eta", "variance"):
            value = getattr(options, option)
            if value is not None and option not in self.takes:
                used = ", ".join(sorted(self.takes)) or "none of steps, spacing, eta, variance"
                raise ValueError(
                    f"{spelled(option, value)}: {spelled('sampler', name)} has no use for it; it takes {used}"
                )

    def settle(
        self,
        name: str,
        options: SamplerOptions,
        process: GaussianDiffusion,
        spelled: Spelled,
        trained_variance: str | None = None,
    ) -> SamplerOptions:
        """Check what a user chose, and take the variance that was trained with where none was chosen.

        Args:
            name: of this sampler, as the user gave it.
            options: as the user gave them; None for those that were not given.
            process: the forward process.
            spelled: (name, value) -> an option as the user wrote it, like "--eta 0.5".
            trained_variance: the variance of the reverse steps that the network was trained with.

        Returns:
            the options to draw with.

        Raises:
            ValueError: an option is out of bounds, unknown, or of no use here; the message begins with the option as
                it is spelled, and says what would be valid.
        """
        self.check_taken(name, options, spelled)
        _check_values(options, process.num_timesteps, spelled)
        if options.variance == "learned" and trained_variance != "learned":
            raise ValueError(
                f"{spelled('variance', 'learned')}: the network does not learn its variance; valid: fixed_large, "
                "fixed_small"
            )
        if process.zero_terminal_snr and options.spacing not in (None, *BEGIN_AT_LAST):
            raise ValueError(
                f"{spelled('spacing', options.spacing)}: does not begin at the last timestep, as "
                f"diffusion.zero_terminal_snr=true needs; valid: {', '.join(sorted(BEGIN_AT_LAST))}"
            )
        if options.steps == 1 < process.num_timesteps and options.spacing not in (None, *BEGIN_AT_LAST):
            raise ValueError(
                f"{spelled('spacing', options.spacing)}: visits only timestep 0 with {spelled('steps', 1)}, and gives "
                f"noise; valid: at least 2 steps, or {', '.join(sorted(BEGIN_AT_LAST))}"
            )
        try:
            self.num_calls(options, process)  # what a scheduler of diffusers cannot do shows here
        except ValueError as error:
            raise ValueError(spelled("sampler", error)) from None
        if "variance" in self.takes and options.variance is None and trained_variance in VARIANCES:
            return replace(options, variance=trained_variance)
        return options


def _check_values(options: SamplerOptions, num_timesteps: int, spelled: Spelled) -> None:
    if options.steps is not None and not 1 <= options.steps <= num_timesteps:
        raise ValueError(
            f"{spelled('steps', options.steps)}: expected 1 to {num_timesteps}, since the run has "
            f"diffusion.num_timesteps={num_timesteps}"
        )
    for name, valid in (("spacing", tuple(SPACINGS)), ("variance", VARIANCES)):
        value = getattr(options, name)
        if value is not None and value not in valid:
            raise ValueError(f"{spelled(name, value)}: expected one of {', '.join(valid)}")
    if options.eta is not None and not 0 <= options.eta <= 1:
        raise ValueError(f"{spelled('eta', options.eta)}: expected 0 to 1")
    threshold = options.dynamic_threshold
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"{spelled('dynamic_threshold', threshold)}: expected a number above 0 and at most 1")
    if threshold is not None and options.clip is False:
        raise ValueError(
            f"{spelled('dynamic_threshold', threshold)}: scales x_0 into [-1, 1], which "
            f"{spelled('clip', False)} forbids; give one of them"
        )


def num_steps(options: SamplerOptions, process: GaussianDiffusion) -> int:
    """How often a sampler calls the denoiser that calls it once at each timestep it visits."""
    return options.num_steps(process.num_timesteps)


def no_noise() -> Tensor:
    """Stands for the noise of samplers that draw none."""
    raise AssertionError("this sampler draws no noise")


def nothing() -> None:
    """Stands for what is done after each call of the denoiser."""

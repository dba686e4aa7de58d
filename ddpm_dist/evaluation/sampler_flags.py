"""The flags by which a command line chooses a sampler, and what they mean for a run. Torch is imported only then."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpm_dist.errors import ConfigError

if TYPE_CHECKING:
    from ddpm_dist.diffusion.process import GaussianDiffusion
    from ddpm_dist.diffusion.samplers import Sampler, SamplerOptions


@dataclass(frozen=True)
class SamplerChoice:
    """The sampler that a command line asks for.

    Attributes:
        name: a name that `find_sampler` knows.
        steps, spacing, eta, variance, clip, dynamic_threshold: as in `SamplerOptions`; None if the flag is not given.
    """

    name: str
    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    variance: str | None = None
    clip: bool | None = None
    dynamic_threshold: float | None = None

    def sampler(self) -> Sampler:
        """The sampler of this name. Raises ConfigError if there is none, or if it does not take these flags."""
        from ddpm_dist.diffusion.samplers import find_sampler

        try:
            sampler = find_sampler(self.name)
        except ValueError as error:
            raise ConfigError(spelled("sampler", error)) from None
        try:
            sampler.check_taken(self.name, self._options(), spelled)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return sampler

    def options(self, process: GaussianDiffusion, trained_variance: str) -> SamplerOptions:
        """How the sampler is set in a run. Raises ConfigError if that cannot be.

        Args:
            process: the run's forward process.
            trained_variance: diffusion.variance of the run.
        """
        try:
            return self.sampler().settle(self.name, self._options(), process, spelled, trained_variance)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _options(self) -> SamplerOptions:
        from ddpm_dist.diffusion.samplers import SamplerOptions

        chosen = dataclasses.asdict(self)
        del chosen["name"]
        return SamplerOptions(**chosen)


def spelled(name: str, value: object) -> str:
    """A flag as one writes it: --dynamic-threshold 0.995, --no-clip."""
    if name == "clip":
        return "--clip" if value else "--no-clip"
    return f"--{name.replace('_', '-')} {value}"


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags by which a sampler is chosen; `sampler_choice` reads them."""
    parser.add_argument(
        "--sampler",
        default="ddim",
        metavar="NAME",
        help="ddim, ddpm, dpm++, heun; or diffusers:CLASS, a scheduler of it [ddim]",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="timesteps to visit [50; ddpm: all]")
    parser.add_argument(
        "--spacing",
        metavar="NAME",
        help="even [ddim, ddpm], leading, trailing, quadratic, log_snr [dpm++, heun]",
    )
    parser.add_argument("--eta", type=float, metavar="X", help="noise that ddim adds, 0 to 1 [0]")
    parser.add_argument(
        "--variance", metavar="NAME", help="noise that ddpm adds: fixed_large, fixed_small, learned [as trained]"
    )
    parser.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="clip the predicted image at each step [all but ddpm do]",
    )
    parser.add_argument(
        "--dynamic-threshold", type=float, metavar="P", help="clip at this quantile of each image instead, like 0.995"
    )


def sampler_choice(args: argparse.Namespace) -> SamplerChoice:
    """What the flags of `add_sampler_flags` say."""
    return SamplerChoice(
        name=args.sampler,
        steps=args.steps,
        spacing=args.spacing,
        eta=args.eta,
        variance=args.variance,
        clip=args.clip,
        dynamic_threshold=args.dynamic_threshold,
    )

"""The flags by which a command line chooses a sampler, and what they mean for a run. Torch is imported only then."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpm_dist.errors import ConfigError

if TYPE_CHECKING:
    from ddpm_dist.diffusion.samplers import Sampler, SamplerOptions


@dataclass(frozen=True)
class SamplerChoice:
    """The sampler that a command line asks for.

    Attributes:
        name: a name in SAMPLERS.
        steps: timesteps to visit; None leaves it to the sampler.
    """

    name: str
    steps: int | None

    def sampler(self) -> Sampler:
        """The sampler of this name. Raises ConfigError if there is none, or if it does not take these flags."""
        from ddpm_dist.diffusion.samplers import SAMPLERS

        if self.name not in SAMPLERS:
            raise ConfigError(f"--sampler {self.name}: expected one of {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[self.name]
        if self.steps is not None and "steps" not in sampler.takes:
            raise ConfigError(
                f"--steps {self.steps}: --sampler {self.name} visits all timesteps; leave --steps out, or give "
                "--sampler ddim"
            )
        return sampler

    def options(self, num_timesteps: int) -> SamplerOptions:
        """How the sampler is set in a run with `num_timesteps`. Raises ConfigError if that cannot be."""
        from ddpm_dist.diffusion.samplers import SamplerOptions

        if self.steps is not None and not 1 <= self.steps <= num_timesteps:
            raise ConfigError(
                f"--steps {self.steps}: expected 1 to {num_timesteps}, since the run has "
                f"diffusion.num_timesteps={num_timesteps}"
            )
        return SamplerOptions(steps=self.steps)


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags by which a sampler is chosen; `sampler_choice` reads them."""
    parser.add_argument(
        "--sampler", default="ddim", metavar="NAME", help="ddim, or ddpm, which visits all timesteps [ddim]"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="timesteps that ddim visits [50]")


def sampler_choice(args: argparse.Namespace) -> SamplerChoice:
    """What the flags of `add_sampler_flags` say."""
    return SamplerChoice(name=args.sampler, steps=args.steps)

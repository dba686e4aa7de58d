"""Samplers: from noise to images, as pure functions of a denoiser.

To add a sampler: write a function with the arguments of `Sample` in a file of this folder, and enter it in SAMPLERS.
"""

from __future__ import annotations

from ddpm_dist.diffusion.samplers.ancestral import ddpm_calls, ddpm_sample
from ddpm_dist.diffusion.samplers.ddim import ddim_sample, ddim_step
from ddpm_dist.diffusion.samplers.dpm_solver import dpm_solver_sample
from ddpm_dist.diffusion.samplers.from_diffusers import PREFIX, sampler_from_diffusers
from ddpm_dist.diffusion.samplers.heun import heun_calls, heun_sample
from ddpm_dist.diffusion.samplers.options import NO_OPTIONS, Sample, Sampler, SamplerOptions, num_steps
from ddpm_dist.diffusion.samplers.spacing import SPACINGS, even_timesteps

__all__ = [
    "NO_OPTIONS",
    "SAMPLERS",
    "SPACINGS",
    "Sample",
    "Sampler",
    "SamplerOptions",
    "ddim_sample",
    "ddim_step",
    "ddpm_sample",
    "dpm_solver_sample",
    "even_timesteps",
    "find_sampler",
    "heun_sample",
    "num_steps",
]

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim_sample, num_steps, clip=True, takes=frozenset({"steps", "spacing", "eta"})),
    "ddpm": Sampler(ddpm_sample, ddpm_calls, clip=False, takes=frozenset({"steps", "spacing", "variance"})),
    "dpm++": Sampler(dpm_solver_sample, num_steps, clip=True, takes=frozenset({"steps", "spacing"})),
    "heun": Sampler(heun_sample, heun_calls, clip=True, takes=frozenset({"steps", "spacing"})),
}
"""The samplers by the name that users give them."""


def find_sampler(name: str) -> Sampler:
    """The sampler of a name in SAMPLERS, or made of a scheduler of diffusers for a name like diffusers:CLASS.

    Raises:
        ValueError: there is none of this name; the message begins with the name, and says what would be valid.
    """
    if name.startswith(PREFIX):
        return sampler_from_diffusers(name)
    if name not in SAMPLERS:
        raise ValueError(f"{name}: expected one of {', '.join(SAMPLERS)}; or {PREFIX}CLASS, a scheduler of diffusers")
    return SAMPLERS[name]

"""Any scheduler of diffusers as a sampler, by its name. diffusers is imported only when such a name is used."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoise
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers.options import Sampler, SamplerOptions

PREFIX = "diffusers:"
SPACINGS = {"even": "linspace", "leading": "leading", "trailing": "trailing"}
"""What diffusers calls our spacings."""

GO_WHOLE_GAPS = frozenset({"DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"})
"""Schedulers whose step goes T // steps timesteps down, whichever timestep comes next."""

VISIT_TWICE = frozenset({"HeunDiscreteScheduler", "PNDMScheduler"})
"""Schedulers that call the network twice at a timestep on purpose. Others would divide by a step of length 0."""

TOLERANCE = 1e-3
"""How far the ᾱ_t of a scheduler may lie from ours, relative to ours; its tables are float32."""


Scheduler = Any
"""A class of diffusers; its types are not checked, since diffusers need not be installed."""


def sampler_from_diffusers(name: str) -> Sampler:
    """A sampler whose steps are those of a scheduler of diffusers.

    Args:
        name: like diffusers:UniPCMultistepScheduler.

    Raises:
        ValueError: diffusers is not installed, has no such scheduler, or the scheduler needs what the sampling of a
            trained DDPM cannot give. The message begins with the name.
    """
    scheduler = _find(name)
    takes = {"steps"}
    takes |= {"spacing"} if "timestep_spacing" in _names(scheduler) else set()
    takes |= {"eta"} if "eta" in _names(scheduler.step) else set()
    sample = _Sample(name, scheduler)
    return Sampler(sample, sample.num_calls, clip=True, takes=frozenset(takes))


class _Sample:
    """The loop over the timesteps of one class of schedulers."""

    def __init__(self, name: str, scheduler: Scheduler) -> None:
        self._name, self._class = name, scheduler

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoise,
        process: GaussianDiffusion,
        x_T: Tensor,
        draw_noise: Callable[[], Tensor],
        options: SamplerOptions,
        on_step: Callable[[], None],
    ) -> Tensor:
        """The images; see `Sample`. Raises ValueError if the scheduler cannot be used with this process.

        The scheduler draws the noise of each image from a generator of its own. Its seed follows from draw_noise.
        """
        scheduler = self._scheduler(process, options, x_T.device)
        arguments: dict[str, Any] = {"return_dict": False}
        if "generator" in _names(self._class.step):
            arguments["generator"] = [_generator(noise) for noise in draw_noise()]
        if options.eta is not None:
            arguments["eta"] = options.eta
        x: Tensor = x_T * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, timestep)
            t = torch.full((len(x),), int(timestep), dtype=torch.long, device=x.device)
            x_start, eps = denoiser(x_t, t)[:2]
            on_step()
            # All of these schedulers know v, and it loses no digits where x_0 or ε would.
            x = scheduler.step(process.predict_v(x_start, t, eps), timestep, x, **arguments)[0]
        return x

    def num_calls(self, options: SamplerOptions, process: GaussianDiffusion) -> int:
        """How often the denoiser is called."""
        return len(self._scheduler(process, options, torch.device("cpu")).timesteps)

    def _scheduler(self, process: GaussianDiffusion, options: SamplerOptions, device: torch.device) -> Any:
        """A scheduler for our schedule, with its timesteps set."""
        known, alphas_cumprod = _names(self._class), process.exact_alphas_cumprod
        before = [1.0, *alphas_cumprod[:-1]]
        if process.zero_terminal_snr and "rescale_betas_zero_snr" not in known:
            raise ValueError(f"{self._name}: not with diffusion.zero_terminal_snr=true, where it divides by 0")
        if options.spacing not in (None, *SPACINGS):
            raise ValueError(f"{self._name}: has no spacing {options.spacing}; valid: {', '.join(SPACINGS)}")
        wanted = {
            "num_train_timesteps": process.num_timesteps,
            "trained_betas": [1 - now / then for now, then in zip(alphas_cumprod, before, strict=True)],
            "prediction_type": "v_prediction",
            "timestep_spacing": SPACINGS[options.spacing or "trailing"],
            "rescale_betas_zero_snr": process.zero_terminal_snr,
            "clip_sample": False,  # the denoiser clips
        }
        scheduler = self._class(**{name: value for name, value in wanted.items() if name in known})
        self._check_schedule(scheduler, process)
        self._set_timesteps(scheduler, process.num_timesteps, options, device)
        return scheduler

    def _check_schedule(self, scheduler: Any, process: GaussianDiffusion) -> None:
        """Check that the scheduler goes by our schedule. Raises ValueError."""
        ours = torch.tensor(process.exact_alphas_cumprod, dtype=torch.float64)
        theirs = scheduler.alphas_cumprod.double().cpu()
        if process.zero_terminal_snr:  # some put a tiny number for the 0 at the end
            ours, theirs = ours[:-1], theirs[:-1]
        if ours.shape != theirs.shape or not torch.allclose(theirs, ours, rtol=TOLERANCE, atol=0):
            raise ValueError(
                f"{self._name}: changes the schedule that it is given, which the network was not trained for"
            )

    def _set_timesteps(self, scheduler: Any, num_timesteps: int, options: SamplerOptions, device: torch.device) -> None:
        """Set the timesteps that are visited, and check that the scheduler can step through them. Raises ValueError."""
        steps, spacing = options.num_steps(num_timesteps), options.spacing or "trailing"
        if self._class.__name__ in GO_WHOLE_GAPS:
            self._check_gaps(num_timesteps, steps, spacing)
        try:
            scheduler.set_timesteps(steps, device=device)
            timesteps = scheduler.timesteps.tolist()
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self._name}: cannot make {steps} steps ({' '.join(str(error).split())})") from None
        if any(timestep != int(timestep) for timestep in timesteps):
            raise ValueError(
                f"{self._name}: visits timesteps between those that the network knows, such as {timesteps[1]:.2f}"
            )
        if timesteps[0] < timesteps[-1]:
            raise ValueError(f"{self._name}: turns images into noise")
        if timesteps == [0] and num_timesteps > 1:
            raise ValueError(
                f"{self._name}: visits only timestep 0 with 1 step and the spacing {spacing}, and gives noise; valid: "
                "at least 2 steps, or the spacing trailing"
            )
        twice = [now for now, then in itertools.pairwise(timesteps) if now == then]
        if twice and self._class.__name__ not in VISIT_TWICE:
            raise ValueError(
                f"{self._name}: visits timestep {twice[0]} twice with {steps} steps and the spacing {spacing}, and "
                "divides by 0 there; valid: fewer steps, or the spacing trailing"
            )

    def _check_gaps(self, num_timesteps: int, steps: int, spacing: str) -> None:
        """Check that the timesteps lie T // steps apart. Raises ValueError, which names numbers of steps that do."""
        fits = {"leading": True, "trailing": num_timesteps % steps == 0, "even": steps == num_timesteps}
        if fits[spacing]:
            return
        divisors = [number for number in range(1, num_timesteps + 1) if num_timesteps % number == 0]
        near = sorted({max(n for n in divisors if n <= steps), min(n for n in divisors if n >= steps)})
        of_steps = " or ".join(str(number) for number in near)
        raise ValueError(
            f"{self._name}: its step has the length T // {steps} = {num_timesteps // steps}, and the spacing {spacing} "
            "has other gaps; valid: the spacing trailing with a number of steps that divides "
            f"diffusion.num_timesteps={num_timesteps}, such as {of_steps}"
        )


def _find(name: str) -> Scheduler:
    """The class that a name like diffusers:CLASS stands for. Raises ValueError; see `sampler_from_diffusers`."""
    try:
        import diffusers
        from diffusers.schedulers.scheduling_utils import SchedulerMixin
    except ImportError:
        raise ValueError(f"{name}: needs the package diffusers: pip install 'ddpm_dist[diffusers]'") from None
    wanted = name.removeprefix(PREFIX)
    found: Scheduler = getattr(diffusers, wanted, None)
    missing = getattr(found, "_backends", None)
    if missing:  # a stand-in for a class whose packages are not installed
        raise ValueError(f"{name}: needs packages of which one is not installed: {', '.join(missing)}")
    if SchedulerMixin not in getattr(found, "__mro__", ()):
        schedulers = [each for each in dir(diffusers) if each.endswith("Scheduler") and not each.startswith("Flax")]
        near = difflib.get_close_matches(wanted, schedulers, n=1, cutoff=0.3) or schedulers
        raise ValueError(f"{name}: diffusers has no such scheduler; the nearest is {', '.join(near)}")
    obstacle = _obstacle(found)
    if obstacle:
        raise ValueError(f"{name}: cannot draw from a DDPM, since {obstacle}")
    return found


def _obstacle(scheduler: Scheduler) -> str | None:
    """Why no DDPM whatever can be drawn from with a scheduler; None if some can."""
    if not hasattr(scheduler, "step") or not {"trained_betas", "prediction_type"} <= _names(scheduler):
        return "it is not made for a schedule of betas"
    step = list(inspect.signature(scheduler.step).parameters.values())[4:]
    more = [parameter.name for parameter in step if parameter.default is parameter.empty]
    if more:
        return f"the step of it needs {', '.join(more)}"
    if "original_inference_steps" in _names(scheduler.set_timesteps):
        return "it is made for consistency models, which are distilled"
    return None


def _names(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def _generator(noise: Tensor) -> torch.Generator:
    """A generator whose seed follows from one image of noise."""
    digest = hashlib.blake2b(noise.cpu().numpy().tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

"""Draws the images that a command line asks for, from the weights of a trained run, into their files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ddpm_dist.errors import ConfigError
from ddpm_dist.evaluation.image_files import Target
from ddpm_dist.evaluation.sampler_flags import SamplerChoice

if TYPE_CHECKING:
    import torch

    from ddpm_dist.diffusion.samplers import Sampler, SamplerOptions
    from ddpm_dist.loading import LoadedRun


@dataclass(frozen=True)
class Request:
    """Which images are asked for, and where they go.

    Attributes:
        run: the run directory.
        num: number of images, at least 1.
        seed: at least 0.
        sampler: which sampler, and how it is set.
        step: step of the checkpoint; None for the newest valid one.
        device: where the images are computed; auto is cuda if there is one.
        target: where the images go; None for a grid in the run directory.
    """

    run: Path
    num: int
    seed: int
    sampler: SamplerChoice
    step: int | None
    device: Literal["auto", "cpu", "cuda"]
    target: Target | None


def draw(request: Request) -> Path:
    """Draw the images and write them.

    Returns:
        the file or folder that was written.

    Raises:
        UserError: the request cannot be met; the message says why.
    """
    from ddpm_dist.backends import configure_backends
    from ddpm_dist.loading import load_run
    from ddpm_dist.parallel.environment import cpu_threads, read_environment

    sampler = request.sampler.sampler()
    run = load_run(request.run, request.step, device=_device(request.device))
    configure_backends(run.config.train, cpu_threads(read_environment()))
    options = request.sampler.options(run.process.num_timesteps)
    target = request.target or _grid_of(request, run)
    try:
        target.probe(request.num)
        height, width = run.image_shape[1:]
        say = f"drawing {request.num} images of {height} x {width} from step {run.step}"
        print(say, file=sys.stderr, flush=True)
        _draw_into(target, request, run, sampler, options)
    except OSError as error:
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(
            f"--out {target.path}: cannot be written ({error.filename or target.path}: {reason})"
        ) from None
    return target.path


def _device(requested: str) -> torch.device:
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no CUDA device; valid here: auto, cpu")
    return torch.device("cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu")


def _grid_of(request: Request, run: LoadedRun) -> Target:
    """The grid in the run directory that is written unless another target is asked for."""
    name = f"{request.sampler.name}-seed{request.seed}-step-{run.step:08d}.png"
    return Target(run.directory.samples / name, "grid")


def _draw_into(target: Target, request: Request, run: LoadedRun, sampler: Sampler, options: SamplerOptions) -> None:
    from tqdm import tqdm

    from ddpm_dist.evaluation.generate import generate_blocks, num_model_calls

    total = num_model_calls(request.num, sampler, options, run.process.num_timesteps)
    with tqdm(total=total, unit="call", desc=f"{request.num} images", disable=None) as bar:
        blocks = generate_blocks(
            run.denoiser(sampler.clip),
            run.process,
            sampler,
            shape=run.image_shape,
            num=request.num,
            seed=request.seed,
            options=options,
            device=next(run.network.parameters()).device,
            on_step=lambda: bar.update() and None,
        )
        target.write(blocks)

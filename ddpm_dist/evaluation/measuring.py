"""Measures what a command line asks for, of a trained run: the likelihood of images that it was not trained on."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddpm_dist.data.images import Images
    from ddpm_dist.diffusion.denoiser import Denoiser
    from ddpm_dist.diffusion.variance import Variance
    from ddpm_dist.evaluation.likelihood import Likelihood
    from ddpm_dist.loading import LoadedRun


@dataclass(frozen=True)
class Request:
    """What is to be measured, and how.

    Attributes:
        num: at most so many images, at least 1.
        on: the test images of the set, or those that the run was trained on.
        num_timesteps: of the timesteps 1 .. T-1, at how many each image is measured; None for all, but at most 50.
        variance: a name in VARIANCES; None for that of the run.
        clip: whether the x_0 that the network predicts is clipped to [-1, 1], as in the code of both papers.
        seed: of the timesteps and the noise, at least 0.
        step: step of the checkpoint; None for the newest valid one.
        weights: a name of weights; None for `ema`.
        data_root: where the images are; None for the run's data.root.
        device: where the network computes; auto is cuda if there is one.
    """

    num: int = 512
    on: Literal["test", "train"] = "test"
    num_timesteps: int | None = None
    variance: str | None = None
    clip: bool = True
    seed: int = 0
    step: int | None = None
    weights: str | None = None
    data_root: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Measured:
    """A result, and all that it takes to measure it again.

    Attributes:
        run: as it was given.
        step, weights: which weights of it.
        variance: a name in VARIANCES.
        images: what was measured, like `test images of mnist`.
        num_timesteps, of: at how many of the timesteps 1 .. T-1 each image was measured, and T - 1.
        clip, seed: as in the request.
        likelihood: the figures.
    """

    run: Path
    step: int
    weights: str
    variance: str
    images: str
    num_timesteps: int
    of: int
    clip: bool
    seed: int
    likelihood: Likelihood

    def as_json(self) -> dict[str, Any]:
        """The result as plain values."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**facts, "run": str(self.run), "likelihood": self.likelihood.as_json()}


def measure_run(path: Path, request: Request) -> Measured:
    """Measure a run.

    Raises:
        UserError: the request cannot be met; the message says why.
    """
    import torch
    from tqdm import tqdm

    from ddpm_dist.backends import configure_backends
    from ddpm_dist.evaluation.likelihood import measure, num_network_calls
    from ddpm_dist.loading import load_run
    from ddpm_dist.parallel.environment import cpu_threads, read_environment
    from ddpm_dist.randomness import generator

    device = _device(request.device)
    run = load_run(path, request.step, request.weights, device)
    configure_backends(run.config.train, cpu_threads(read_environment()))
    of = run.process.num_timesteps - 1
    num_groups = min(50, of) if request.num_timesteps is None else request.num_timesteps
    if not 1 <= num_groups <= of:
        raise ConfigError(
            f"--timesteps {num_groups}: expected 1 to {of}, since the run has diffusion.num_timesteps={of + 1}"
        )
    name, variance = _variance(run, request.variance)
    images = _images(run, request)
    # The first images of a set may be easier than the others, as in MNIST. This order is the same for all runs.
    order = torch.randperm(len(images), generator=generator("held-out images")).tolist()[: request.num]
    denoiser = run.denoiser(request.clip)

    def with_labels(cond: Mapping[str, Tensor]) -> Denoiser:
        return dataclasses.replace(denoiser, cond=cond)

    total = num_network_calls(len(order), num_groups)
    with tqdm(total=total, unit="call", desc=f"{len(order)} images", disable=None) as bar:
        likelihood = measure(
            with_labels,
            run.process,
            images,
            order,
            variance=variance,
            num_groups=num_groups,
            seed=request.seed,
            device=device,
            on_call=lambda: bar.update() and None,
        )
    what = f"{request.on} images of {run.config.data.name}"
    return Measured(path, run.step, run.weights, name, what, num_groups, of, request.clip, request.seed, likelihood)


def _device(requested: str) -> torch.device:
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no CUDA device; valid here: auto, cpu")
    return torch.device("cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu")


def _variance(run: LoadedRun, asked: str | None) -> tuple[str, Variance | None]:
    """The name of the variance, and the variance itself if it is a fixed one. Raises ConfigError."""
    from ddpm_dist.diffusion.variance import VARIANCES

    own = run.config.diffusion.variance
    name = own if asked is None else asked
    if name not in VARIANCES:
        raise ConfigError(f"--variance {name}: expected one of {', '.join(VARIANCES)}")
    if VARIANCES[name].num_parts == 1:
        return name, VARIANCES[name](run.process)
    if name != own:
        raise ConfigError(
            f"--variance {name}: this network learned no variance (diffusion.variance={own}); valid: "
            f"{', '.join(each for each, kind in VARIANCES.items() if kind.num_parts == 1)}"
        )
    return name, None


def _images(run: LoadedRun, request: Request) -> Images:
    """The images to measure, fetched if they are missing and the run allows that. Raises UserError."""
    from ddpm_dist.data import datasets

    data, labels, held_out = run.config.data, run.num_classes > 0, request.on == "test"
    if request.data_root is not None:
        data = dataclasses.replace(data, root=request.data_root)
    if held_out and data.name not in datasets.HELD_OUT:
        raise ConfigError(
            f"--on test: data.name={data.name} has no test images of its own; give --on train to measure the images "
            "that the run was trained on"
        )
    if data.download and datasets.missing_files(data, labels, held_out):
        print(f"{data.name}: not in {data.root} yet; fetching it from its publishers", file=sys.stderr, flush=True)
    datasets.prepare(data, labels, held_out)
    images = datasets.read(data, run.image_shape[0], labels, held_out)
    if images.shape != run.image_shape:
        raise DataError(
            f"data.root={data.root}: images of {images.shape}, and the run was trained on {run.image_shape} "
            "(channels, height, width)"
        )
    if not held_out and images.fingerprint != run.contract["images"]:
        raise DataError(f"data.root={data.root}: not the images that this run was trained on; give --data-root DIR")
    return images

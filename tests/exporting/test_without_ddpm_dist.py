"""What is exported draws the images of our samplers without ddpm_dist, by the code that its card prints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_diffusers import code_of, execute
from random_runs import TINY_UNET, TINY_UNET2D, make_run
from torch import Tensor

from ddpm_dist.diffusion.samplers import SAMPLERS, SamplerOptions
from ddpm_dist.export import main
from ddpm_dist.loading import LoadedRun, load_run

pytestmark = pytest.mark.slow

SMALL = "diffusion.variance=fixed_small"
LABELS = ("model.class_labels=true",)
RUNS: dict[str, tuple[tuple[str, ...], int, int]] = {  # overrides, channels of the images, number of classes
    "unet": ((*TINY_UNET, "diffusion.schedule=sigmoid", "diffusion.prediction=v"), 1, 0),
    "unet with labels": ((*TINY_UNET, *LABELS, "diffusion.variance=learned"), 3, 4),
    "unet2d": (TINY_UNET2D, 3, 0),
    "unet2d of v": ((*TINY_UNET2D, "diffusion.prediction=v", "diffusion.zero_terminal_snr=true"), 1, 0),
    "unet2d of its variance": ((*TINY_UNET2D, "diffusion.variance=learned"), 1, 0),
    "unet2d with labels": ((*TINY_UNET2D, *LABELS, "diffusion.prediction=x0", SMALL), 1, 3),
}
CLOSE = 1e-4  # of images in [0, 1]


@dataclass(frozen=True)
class Exported:
    """A run, and the images that each piece of code on its card draws; with labels, also with guidance = 3."""

    run: LoadedRun
    images: list[Tensor]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """One process draws them all."""
    place = tmp_path_factory.mktemp("exports")
    runs, codes = {}, list[tuple[Path, str]]()
    for name, (overrides, channels, classes) in RUNS.items():
        run, out = place / f"{name} run", place / name
        make_run(run, "diffusion.num_timesteps=100", *overrides, channels=channels, num_classes=classes)
        assert main([str(run), "--to", "diffusers", "--out", str(out)]) == 0
        printed = code_of(out)
        guided = [code.replace("guidance = 1.0", "guidance = 3.0") for code in printed if "guidance = 1.0" in code]
        runs[name], codes = load_run(run), [*codes, *((out, code) for code in [*printed, *guided])]
    images = execute(codes, place / "images")
    return {
        name: Exported(run, [drawn for (out, _), drawn in zip(codes, images, strict=True) if out.name == name])
        for name, run in runs.items()
    }


def ours(run: LoadedRun, sampler: str = "ddpm", guidance: float = 1.0, **chosen: Any) -> Tensor:
    """The same images of our sampler: four in [0, 1], whose noise comes from torch's generator seeded by 0."""
    how = SAMPLERS[sampler]
    denoiser = run.denoiser(how.clip, guidance)
    if run.num_classes:
        denoiser = replace(denoiser, cond={"labels": torch.tensor([0, 0, *[run.num_classes - 1] * 2])})

    def draw_noise() -> Tensor:
        return torch.randn(4, *run.image_shape)

    torch.manual_seed(0)
    options = SamplerOptions(**chosen, variance=run.config.diffusion.variance)
    images = how.sample(denoiser, run.process, draw_noise(), draw_noise, options, lambda: None)
    assert images.std() > 0.1
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", RUNS)
def test_ancestral_sampling_gives_the_same_images(exported: dict[str, Exported], name: str) -> None:
    run, images = exported[name].run, exported[name].images
    assert torch.allclose(images[0], ours(run), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["unet with labels", "unet2d with labels"])
def test_guidance_gives_the_same_images(exported: dict[str, Exported], name: str) -> None:
    run, images = exported[name].run, exported[name].images
    assert torch.allclose(images[1], ours(run, guidance=3.0), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["unet2d", "unet2d of v"])
def test_ddim_gives_the_same_images(exported: dict[str, Exported], name: str) -> None:
    run, images = exported[name].run, exported[name].images
    assert torch.allclose(images[1], ours(run, "ddim", steps=50, spacing="trailing"), rtol=0, atol=CLOSE)

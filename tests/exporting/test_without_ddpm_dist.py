"""What is exported draws the images of `sample` in a process without ddpm_dist, by the code that its card prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import train
from plain_diffusers import code_of, difference, execute

from ddpm_dist.diffusion.samplers import NO_OPTIONS, SAMPLERS, SamplerOptions
from ddpm_dist.export import main
from ddpm_dist.loading import load_run

pytestmark = pytest.mark.slow

QUICK = (
    *("data.image_size=8", "diffusion.num_timesteps=20", "train.max_steps=3", "ema.decay=0.5", "optim.lr=0.01"),
    *("preview.num_images=1", "preview.steps=1"),
)


def ours(run: Path, sampler: str = "ddpm", options: SamplerOptions = NO_OPTIONS) -> torch.Tensor:
    """Four images in [0, 1], from torch's generator seeded by 0."""
    loaded = load_run(run)

    def draw_noise() -> torch.Tensor:
        return torch.randn(4, *loaded.image_shape)

    torch.manual_seed(0)
    chosen = SAMPLERS[sampler]
    images = chosen.sample(
        loaded.denoiser(chosen.clip), loaded.process, draw_noise(), draw_noise, options, lambda: None
    )
    return (images / 2 + 0.5).clamp(0, 1)


def test_the_reference_network_goes_with_the_one_module_that_it_needs(tmp_path: Path) -> None:
    run = train(1, tmp_path, *QUICK)
    assert main([str(run), "--to", "diffusers", "--out", str(tmp_path / "folder")]) == 0
    (images,) = execute(tmp_path / "folder", code_of(tmp_path / "folder"), tmp_path / "images")
    assert difference(images, ours(run)) < 1e-4
    assert not (tmp_path / "folder" / "model_index.json").exists(), "diffusers would believe that it can load this"

"""A preview whose images are not finite is a warning: training goes on without it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm_dist.config import load_config
from ddpm_dist.diffusion.predictions import EpsPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas
from ddpm_dist.training.tasks import Preview


def drawn(factor: float, samples: Path, said: list[str]) -> list[Path]:
    """The pictures that a preview at step 7 leaves, of a network whose output is the factor everywhere."""
    process = GaussianDiffusion(linear_betas(10))
    trainer = SimpleNamespace(
        step=7,
        averages={"ema": SimpleNamespace(model=lambda x, t: torch.full_like(x, factor))},
        loss=SimpleNamespace(process=process, prediction=EpsPrediction(process), variance=None),
        ranks=SimpleNamespace(device=torch.device("cpu"), on_rank_zero=lambda work: work(lambda: False)),
    )
    context: Any = SimpleNamespace(
        config=load_config(None, ["preview.num_images=2", "preview.steps=2", "diffusion.num_timesteps=10"]),
        trainer=trainer,
        image_shape=(1, 4, 4),
        attempt=SimpleNamespace(directory=SimpleNamespace(samples=samples), check=lambda: None),
        clock=SimpleNamespace(paused=contextlib.nullcontext),
        recorder=SimpleNamespace(say=said.append),
    )
    Preview(context).run()
    return list(samples.glob("*"))


@pytest.mark.parametrize("factor", [float("nan"), 0.5])
def test_a_preview_that_is_not_finite_is_left_out_with_a_warning(factor: float, tmp_path: Path) -> None:
    said: list[str] = []
    pictures = drawn(factor, tmp_path, said)
    if factor == 0.5:
        assert [path.name for path in pictures] == ["step-00000007.png"]
        assert said == [f"step 7: a grid of images is in {pictures[0]}"]
    else:
        assert pictures == []
        (line,) = said
        assert line.startswith("warning: step 7: no grid of images: images 0 to 63: not all numbers in them are finite")

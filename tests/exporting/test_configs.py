"""The config file of an exported scheduler has our betas, prediction and variance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from random_runs import TINY_UNET, make_run

from ddpm_dist.build import build_process
from ddpm_dist.config import load_config
from ddpm_dist.exporting.scheduler import scheduler_of
from ddpm_dist.loading import LoadedRun, load_run


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return load_run(make_run(tmp_path_factory.mktemp("runs") / "run", *TINY_UNET))


def with_config(loaded: LoadedRun, *overrides: str) -> LoadedRun:
    """The same run with another config and process."""
    config = load_config(None, overrides)
    return replace(loaded, config=config, process=build_process(config, torch.device("cpu")))


@pytest.mark.parametrize("zero", ["false", "true"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_the_betas_are_ours(loaded: LoadedRun, tmp_path: Path, schedule: str, zero: str, num_timesteps: int) -> None:
    """As they are read back by both schedulers; by name only where diffusers makes the same of it."""
    run = with_config(
        loaded,
        f"diffusion.schedule={schedule}",
        f"diffusion.zero_terminal_snr={zero}",
        f"diffusion.num_timesteps={num_timesteps}",
        *("diffusion.prediction=v", "diffusion.beta_end=0.05", "preview.steps=1"),
    )
    scheduler_of(run).save_pretrained(tmp_path)
    for kind in (DDPMScheduler, DDIMScheduler):
        read = kind.from_pretrained(tmp_path)
        torch.testing.assert_close(read.betas, run.process.betas, rtol=1e-6, atol=0)
        torch.testing.assert_close(read.alphas_cumprod, run.process.alphas_cumprod, rtol=0, atol=1e-6)
        assert (read.config.trained_betas is None) == (schedule != "sigmoid" and zero == "false")
        assert read.config.rescale_betas_zero_snr is False
        assert read.config.num_train_timesteps == num_timesteps


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_the_prediction_has_its_name_there(loaded: LoadedRun, ours: str, theirs: str) -> None:
    assert scheduler_of(with_config(loaded, f"diffusion.prediction={ours}")).config.prediction_type == theirs


@pytest.mark.parametrize(("ours", "theirs"), [("fixed_large",) * 2, ("fixed_small",) * 2, ("learned", "learned_range")])
def test_the_variance_has_its_name_there(loaded: LoadedRun, ours: str, theirs: str) -> None:
    scheduler = scheduler_of(with_config(loaded, f"diffusion.variance={ours}"))
    assert scheduler.config.variance_type == theirs
    assert scheduler.config.clip_sample is False, "our ancestral sampler does not clip"

"""The config files of an export: the scheduler has our betas, prediction and variance; Ho's network has his keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from presets import GOOGLE_DDPM_CIFAR10_32
from random_runs import TINY_UNET, make_run

from ddpm_dist.build import build_model, build_process
from ddpm_dist.config import load_config
from ddpm_dist.exporting.diffusers_folder import as_diffusers_has_it
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


SINCE_THEN = {  # keys that UNet2DModel did not have then, with what it does without them; dropout is for training
    "dropout": 0.1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_dim": None,
}


def test_the_network_of_ho_et_al_has_the_keys_of_their_published_one(tmp_path: Path) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "cifar10-ho2020.yaml")
    with torch.device("meta"):  # the keys are wanted, and no weights
        network = build_model(config, (3, 32, 32), 0, torch.device("meta"), channels_last=False)
        as_diffusers_has_it(network).save_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in GOOGLE_DDPM_CIFAR10_32} == GOOGLE_DDPM_CIFAR10_32
    assert written["_class_name"] == "UNet2DModel"
    later = {
        key: value for key, value in written.items() if key not in GOOGLE_DDPM_CIFAR10_32 and not key.startswith("_")
    }
    assert later == SINCE_THEN

"""Every file of configs/ trains, stops and goes on to the bit; the published networks have their published sizes.

`python tests/presets.py` does more, through the real command: 20 steps, SIGKILL, and an update at full width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, call_train, state_differences
from presets import GOOGLE_DDPM_CIFAR10_32, PRESETS, ROOT, make_pictures, narrow, on_this_machine
from torch import nn

from ddpm_dist.build import build_model
from ddpm_dist.config import load_config, to_flat


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def train_whole_and_half(argv: Sequence[str]) -> int:
    """In one process, a run of two steps, and one that stops after the first. Runs in the fork."""
    whole = call_train([*argv, "run.name=whole", "train.max_steps=2"])
    return whole or call_train([*argv, "run.name=moved", "train.max_steps=1"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_stops_and_goes_on_to_the_bit_on_twice_as_many_ranks(
    preset: Path, pictures: Path, tmp_path: Path
) -> None:
    if load_config(preset).model.name == "unet2d":
        pytest.importorskip("diffusers")
    given = ["--config", str(preset), *on_this_machine(preset, pictures), *narrow(load_config(preset))]
    given = [*given, f"run.root={tmp_path}"]
    with Job(1, tmp_path / "first.log", train_whole_and_half, (given,)) as job:
        assert job.wait() == [0], job.output()
    with Job(2, tmp_path / "moved.log", call_train, ([*given, "run.name=moved", "train.max_steps=2"],)) as job:
        assert job.wait() == [0, 0], job.output()
        assert "resumes at step 1 of 2, 2 rank(s)" in job.output()
    assert state_differences(tmp_path / "whole", tmp_path / "moved") == []


# The networks of the papers


def network(preset: str, size: int = 32) -> Any:
    """The network at full width, on the meta device, where it takes no memory."""
    pytest.importorskip("diffusers")
    config = load_config(ROOT / "configs" / f"{preset}.yaml")
    with torch.device("meta"):
        return build_model(config, (3, size, size), 0, torch.device("meta"), channels_last=False)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_cifar10_ho2020_is_the_network_of_the_published_weights() -> None:
    model = network("cifar10-ho2020")
    assert num_parameters(model) == 35_746_307
    ours = {name: list(value) if isinstance(value, tuple) else value for name, value in model.config.items()}
    assert {name: ours[name] for name in GOOGLE_DDPM_CIFAR10_32} == GOOGLE_DDPM_CIFAR10_32


def test_cifar10_ho2020_has_the_numbers_of_the_paper() -> None:
    """Ho et al. 2020, appendix B, and scripts/run_cifar.py of their code."""
    flat = to_flat(load_config(ROOT / "configs" / "cifar10-ho2020.yaml"))
    numbers = {"data.name": "cifar10", "data.flip": True, "data.batch_size": 128, "unet2d.dropout": 0.1}
    numbers |= {"diffusion.num_timesteps": 1000, "diffusion.schedule": "linear", "diffusion.prediction": "eps"}
    numbers |= {"diffusion.beta_start": 1e-4, "diffusion.beta_end": 0.02, "diffusion.variance": "fixed_large"}
    numbers |= {"optim.name": "adam", "optim.lr": 2e-4, "optim.warmup_steps": 5000, "optim.grad_clip": 1.0}
    numbers |= {"ema.decay": 0.9999, "train.max_steps": 800_000, "unet2d.zero_init": True}
    assert {name: flat[name] for name in numbers} == numbers


def improved_parameters(
    channels: int, multipliers: Sequence[int], attended: Sequence[int], layers: int, out_channels: int
) -> int:
    """The number of weights of UNetModel in openai/improved-diffusion (unet.py), counted by its layers.

    Args:
        attended: the levels with attention; level 0 is the full resolution.
        layers: residual blocks of a level on the way down; one more on the way up.
    """

    def conv(into: int, out: int, size: int = 3) -> int:
        return size * size * into * out + out

    def norm(width: int) -> int:
        return 2 * width

    def block(into: int, out: int) -> int:  # scale-shift norm: the time embedding gives two numbers a channel
        inner = norm(into) + conv(into, out) + conv(4 * channels, 2 * out, 1) + norm(out) + conv(out, out)
        return inner + (conv(into, out, 1) if into != out else 0)

    def attention(width: int) -> int:
        return norm(width) + conv(width, 3 * width, 1) + conv(width, width, 1)

    total = conv(channels, 4 * channels, 1) + conv(4 * channels, 4 * channels, 1) + conv(3, channels)
    width, kept = channels, [channels]
    for level, multiplier in enumerate(multipliers):
        for _ in range(layers):
            total += block(width, multiplier * channels)
            width = multiplier * channels
            total += attention(width) if level in attended else 0
            kept.append(width)
        if level < len(multipliers) - 1:
            total += conv(width, width)
            kept.append(width)
    total += block(width, width) + attention(width) + block(width, width)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for number in range(layers + 1):
            total += block(width + kept.pop(), multiplier * channels)
            width = multiplier * channels
            total += attention(width) if level in attended else 0
            total += conv(width, width) if level and number == layers else 0
    return total + norm(width) + conv(width, out_channels)


@pytest.mark.parametrize(
    ("preset", "size", "multipliers", "attended", "published"),
    [
        ("cifar10-improved", 32, (1, 2, 2, 2), (1, 2), 52_546_438),
        ("folder64", 64, (1, 2, 3, 4), (2, 3), 121_063_942),
    ],
)
def test_the_improved_networks_have_as_many_weights_as_those_of_the_paper(
    preset: str, size: int, multipliers: Sequence[int], attended: Sequence[int], published: int
) -> None:
    assert improved_parameters(128, multipliers, attended, layers=3, out_channels=6) == published
    assert num_parameters(network(preset, size)) == published


def test_cifar10_improved_has_the_numbers_of_the_paper() -> None:
    """README and script_util.py of openai/improved-diffusion."""
    flat = to_flat(load_config(ROOT / "configs" / "cifar10-improved.yaml"))
    numbers = {"data.name": "cifar10", "data.flip": False, "data.batch_size": 128, "unet2d.dropout": 0.3}
    numbers |= {"diffusion.num_timesteps": 4000, "diffusion.schedule": "cosine", "diffusion.prediction": "eps"}
    numbers |= {"diffusion.variance": "learned", "loss.weighting": "simple", "loss.vlb_weight": 0.001}
    numbers |= {"optim.lr": 1e-4, "optim.grad_clip": None, "ema.decay": 0.9999, "train.max_steps": 500_000}
    assert {name: flat[name] for name in numbers} == numbers


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_where_it_comes_from_and_who_has_trained_it(preset: Path) -> None:
    text = preset.read_text()
    assert len(text.splitlines()) <= 25
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    if preset.stem not in ("quickstart", "mnist"):
        assert "Nobody here has trained it to" in comments
        assert "Meant for " in comments
        assert "arXiv:" in comments

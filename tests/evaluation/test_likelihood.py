"""Bits per dimension: of Gaussian images, whose likelihood is known, and of a tiny run by the real command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_images import GaussianImages, KnowsAll
from harness import final_state, start, state_differences, train
from torch import Tensor

from ddpm_dist import evaluate, sample
from ddpm_dist.data.in_memory import ImagesInMemory, read_mnist5k_labels
from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.predictions import PREDICTIONS
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.schedules import linear_betas
from ddpm_dist.diffusion.variance import VARIANCES
from ddpm_dist.evaluation import likelihood
from ddpm_dist.evaluation.likelihood import Likelihood, groups_of, measure
from ddpm_dist.models.unet import UNet
from ddpm_dist.randomness import generator

BETAS = linear_betas(30, 0.005, 0.5)
GAUSSIAN = GaussianImages()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """uint8 [48, 1, 12, 12]."""
    levels = np.random.default_rng(0).choice(
        256, (48, 1, 12, 12), p=GAUSSIAN.probabilities / GAUSSIAN.probabilities.sum()
    )
    return levels.astype(np.uint8)


def measured(
    pixels: np.ndarray, indices: Sequence[int], num_groups: int = 29, seed: int = 0, variance: str | None = None
) -> Likelihood:
    process = GaussianDiffusion(BETAS)
    network = KnowsAll(GAUSSIAN, BETAS, "eps", learned=True)
    denoiser = Denoiser(
        network, process, PREDICTIONS["eps"](process), clip=False, variance=VARIANCES["learned"](process)
    )
    calls = []
    found = measure(
        lambda cond: denoiser,
        process,
        ImagesInMemory(pixels),
        indices,
        variance=VARIANCES[variance](process) if variance else None,
        num_groups=num_groups,
        seed=seed,
        device=torch.device("cpu"),
        on_call=lambda: calls.append(1),
    )
    assert len(calls) == likelihood.num_network_calls(len(indices), num_groups)
    return found


def test_the_best_network_says_the_likelihood_of_the_very_images(pixels: np.ndarray) -> None:
    found = measured(pixels, range(48))
    exact = -np.log2(GAUSSIAN.probabilities[pixels]).mean()
    assert found.total.standard_error is not None
    assert 0 < found.total.standard_error < 0.02
    assert found.total.mean == pytest.approx(exact, abs=4 * found.total.standard_error)
    parts = (found.prior, found.divergences, found.decoding)
    assert found.total.mean == pytest.approx(sum(part.mean for part in parts), rel=1e-12)
    assert found.divergences.mean == pytest.approx(sum(part.mean for *_, part in found.groups), rel=1e-12)
    assert [(first, last) for first, last, _ in found.groups] == [(t, t) for t in range(1, 30)]


def test_a_fixed_variance_is_worse_than_the_learned_one(pixels: np.ndarray) -> None:
    learned = measured(pixels, range(48)).total.mean
    for name in ("fixed_small", "fixed_large"):
        assert measured(pixels, range(48), variance=name).total.mean > learned + 0.05


def test_few_timesteps_have_the_mean_of_all(pixels: np.ndarray) -> None:
    every = measured(pixels, range(48))
    for num_groups in (1, 7):
        few = [measured(pixels, range(48), num_groups, seed).divergences for seed in range(5)]
        mean = sum(each.mean for each in few) / 5
        error = max(each.standard_error or 0.0 for each in few) / 5**0.5
        assert mean == pytest.approx(every.divergences.mean, abs=4 * error)


def test_groups_hold_every_timestep_but_the_first_once() -> None:
    for num_timesteps in (2, 10, 1000):
        for num_groups in {1, 2, 7, num_timesteps - 1} & set(range(1, num_timesteps)):
            groups = groups_of(num_timesteps, num_groups)
            assert [t for group in groups for t in group] == list(range(1, num_timesteps))
            assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_an_image_has_the_same_figures_whatever_is_measured_with_it(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [measured(pixels, [index], 3).total.mean for index in (5, 40, 2)]
    monkeypatch.setattr(likelihood, "BLOCK_SIZE", 2)
    together = measured(pixels, [40, 2, 5], 3)
    assert together.total.mean == pytest.approx(sum(alone) / 3, rel=1e-6)
    assert together.num_images == 3
    assert measured(pixels, [5], 3).total.standard_error is None
    assert measured(pixels, [5], 3, seed=1).total.mean != pytest.approx(alone[0], rel=1e-4)


# The command, on a run with a learned variance


LEARNED = (
    "diffusion.num_timesteps=12",
    "diffusion.variance=learned",
    "preview.num_images=2",
    "preview.steps=3",
    "train.max_steps=20",
    "checkpoint.every=5",
)
FEW = ("--num", "5", "--on", "train", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads beside another busy process are many times slower than one."""
    monkeypatch.setattr("ddpm_dist.parallel.environment.cpu_threads", lambda world: 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("learned"), *LEARNED)


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """What the command prints with --json."""
    assert evaluate.main([*map(str, arguments), *FEW, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_command_says_the_terms_and_how_they_were_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (found,) = asked(capsys, run)
    facts = {"step": 20, "weights": "ema", "variance": "learned", "num_timesteps": 11, "of": 11, "clip": True}
    assert {name: found[name] for name in facts} == facts
    terms = found["likelihood"]
    parts = (terms["L_T"], terms["L_1..L_T-1"], terms["L_0"])
    assert terms["bits_per_dim"] == pytest.approx(sum(part["bits_per_dim"] for part in parts), rel=1e-12)
    assert (terms["num_images"], len(terms["timesteps"])) == (5, 11)
    assert asked(capsys, run) == [found], "the same seed, the same figures"
    assert evaluate.main([str(run), *FEW, "--timesteps", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}: step 20, weights ema, variance learned; 5 train images of mnist5k, 3 of 11 timesteps"
    assert [line.split()[0] for line in lines[1:]] == ["L_12", "L_1", "L_0", "bits/dim"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_every_choice_has_an_effect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["", "--seed 1", "--variance fixed_small", "--no-clip", "--weights model", "--step 15"]
    figures = [asked(capsys, run, *choice.split())[0]["likelihood"]["bits_per_dim"] for choice in choices]
    assert len(set(figures)) == len(choices)
    assert [found["step"] for found in asked(capsys, run, run, "--timesteps", "2")] == [20, 20]


@pytest.mark.slow
def test_a_network_with_labels_is_told_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = train(1, tmp_path, *LEARNED, "model.class_labels=true")
    (found,) = asked(capsys, labelled)
    seen: list[Tensor] = []

    def watch(network: UNet, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return forward(network, x, t, labels)

    forward = UNet.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", watch)
        assert asked(capsys, labelled) == [found]
    order = torch.randperm(5000, generator=generator("held-out images"))[:5]
    assert all(torch.equal(labels, read_mnist5k_labels().numbers[order]) for labels in seen)
    assert len(seen) == 12


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_run_that_learned_its_variance_is_sampled(run: Path, tmp_path: Path, sampler: str) -> None:
    assert sample.main([str(run), "--num", "2", "--sampler", sampler, "--out", str(tmp_path / "images.npz")]) == 0
    assert (run / "samples" / "step-00000020.png").exists()


@pytest.mark.slow
def test_learned_variance_survives_a_kill_to_the_bit(run: Path, tmp_path: Path) -> None:
    with start(1, tmp_path, *LEARNED, "train.max_steps=10") as job:
        assert job.wait() == [0]
    assert state_differences(run, train(1, tmp_path, *LEARNED)) == []
    assert final_state(run)["model"]["out_conv.weight"].shape[0] == 2

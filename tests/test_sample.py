"""`python -m ddpm_dist.sample`, as a user calls it, on a tiny trained run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import train
from PIL import Image

from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.sample import main

QUICK = ("diffusion.num_timesteps=20", "preview.steps=5", "train.max_steps=3", "model.dropout=0.2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("sample"), *QUICK, "preview.num_images=64")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads beside another busy process are many times slower than one."""
    monkeypatch.setattr("ddpm_dist.parallel.environment.cpu_threads", lambda world: 1)


def npz(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return np.array(file["arr_0"])


def test_npz_is_what_evaluators_read(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--num", "5", "--steps", "3", "--out", str(tmp_path / "images.npz")]) == 0
    images = npz(tmp_path / "images.npz")
    assert images.shape == (5, 28, 28, 1)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 5


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.slow
def test_same_seed_gives_the_same_images_whatever_the_number(run: Path, tmp_path: Path, sampler: str) -> None:
    for num in (3, 70):
        assert main([str(run), "--num", str(num), "--sampler", sampler, "--out", str(tmp_path / f"{num}.npz")]) == 0
    assert (npz(tmp_path / "70.npz")[:3] == npz(tmp_path / "3.npz")).all()
    assert main([str(run), "--num", "3", "--seed", "1", "--sampler", sampler, "--out", str(tmp_path / "o.npz")]) == 0
    assert (npz(tmp_path / "o.npz") != npz(tmp_path / "3.npz")).any()


def test_folder_holds_the_same_images_as_the_npz(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--num", "3", "--steps", "4", "--out", f"{tmp_path}/images/"]) == 0
    assert main([str(run), "--num", "3", "--steps", "4", "--out", f"{tmp_path}/images.npz"]) == 0
    files = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in files] == ["00000.png", "00001.png", "00002.png"]
    for path, expected in zip(files, npz(tmp_path / "images.npz"), strict=True):
        assert (np.asarray(Image.open(path)) == expected[:, :, 0]).all()


@pytest.mark.parametrize(
    "flags",
    [
        ["--sampler", "dpm++", "--steps", "5"],
        ["--sampler", "heun", "--steps", "3", "--no-clip"],
        ["--sampler", "ddpm", "--variance", "fixed_small", "--clip", "--steps", "4", "--spacing", "trailing"],
        ["--eta", "0.5", "--steps", "4", "--spacing", "quadratic", "--dynamic-threshold", "0.9"],
        ["--sampler", "diffusers:UniPCMultistepScheduler", "--steps", "4"],
    ],
)
def test_every_sampler_draws_by_its_flags(run: Path, tmp_path: Path, flags: list[str]) -> None:
    for num in (2, 3):
        assert main([str(run), "--num", str(num), *flags, "--out", str(tmp_path / f"{num}.npz")]) == 0
    two, three = (np.load(tmp_path / f"{num}.npz")["arr_0"] for num in (2, 3))
    assert (three[:2] == two).all()
    assert (three[0] != three[1]).any()


def test_default_grid_is_the_runs_own_last_preview(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--steps", "5"]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == run / "samples" / "ddim-seed0-step-00000003.png"
    assert (np.asarray(Image.open(written)) == np.asarray(Image.open(run / "samples/step-00000003.png"))).all()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--num", "0"], 78, "--num 0"),
        (["--steps", "21"], 78, "1 to 20"),
        (["--sampler", "ddpm", "--eta", "0.5"], 78, "it takes spacing, steps, variance"),
        (["--seed", "-1"], 78, "--seed"),
        (["--step", "77"], 65, "no checkpoint of step 77; there are: "),
        (["--out", "grid.jpg"], 78, "expected grid.png, images.npz or a folder/"),
        (["--none"], 78, "--none"),
    ],
)
def test_mistakes_get_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main([str(run), *arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error:")
    assert words in lines[0]


def test_part_that_only_a_later_version_knows_is_named_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later, store = tmp_path / "later", CheckpointStore(tmp_path / "later" / "checkpoints")
    checkpoint = CheckpointStore(run / "checkpoints").load(3)
    store.save(dataclasses.replace(checkpoint, config=checkpoint.config | {"diffusion.schedule": "spiral"}), {})
    shutil.copy(run / "config.yaml", later)
    assert main([str(later)]) == 65
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "step 3 cannot be used here" in line
    assert "diffusion.schedule=spiral: expected one of linear" in line

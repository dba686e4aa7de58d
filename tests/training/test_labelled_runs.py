"""A run with labels: what an interruption or other ranks change (nothing), and with which folders it may go on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import final_state, start, state_differences, train
from PIL import Image
from torch import Tensor

from ddpm_dist import sample
from ddpm_dist.build import build_model
from ddpm_dist.errors import StopRequested
from ddpm_dist.evaluation.drawing import Drawing
from ddpm_dist.loading import load_run

CLASSES = ("ape", "bee", "cow")
NUM = 24
RUN = (
    *("data.name=folder", "data.image_size=8", "data.num_workers=0", "data.flip=true"),
    *("model.class_labels=true", "model.label_dropout=0.3", "elastic.mode=bitwise", "diffusion.num_timesteps=20"),
    *("train.max_steps=6", "checkpoint.every=3", "preview.num_images=7", "preview.steps=2", "preview.guidance=3"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures; those of a class lie in its sub-folder."""
    path = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = path / CLASSES[number % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number:02}.png")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return train(1, tmp_path_factory.mktemp("runs"), *RUN, f"data.root={folder}")


def test_interrupted_on_one_rank_it_ends_as_on_two_without_a_stop(tmp_path: Path, folder: Path, run: Path) -> None:
    train(2, tmp_path, *RUN, f"data.root={folder}", "train.max_steps=3")
    again = train(1, tmp_path, *RUN, f"data.root={folder}")
    assert state_differences(run, again) == []
    contract = final_state(run)["contract"]
    assert (contract["num_classes"], contract["class_names"]) == (3, list(CLASSES))


def test_labels_are_learned_from_and_the_null_label_too(run: Path) -> None:
    state = final_state(run)
    with torch.random.fork_rng(devices=[]):
        loaded = load_run(run)
        untrained = build_model(loaded.config, (1, 8, 8), 3, torch.device("cpu"), channels_last=False)
    before, after = (weights["label_embedding.weight"] for weights in (untrained.state_dict(), state["model"]))
    assert before.shape == after.shape == (4, before.shape[1])
    assert [bool(row.any()) for row in after - before] == [True] * 4


def test_preview_has_a_row_for_each_class(run: Path) -> None:
    with Image.open(run / "samples" / "step-00000006.png") as grid:
        width, height = grid.size
    assert (width, height) == (3 * 66 + 2, 3 * 66 + 2), "seven images of three classes: rows of three, two and two"


def test_each_class_can_be_drawn_by_name_and_is_the_same_image_in_any_company(
    tmp_path: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def drawn(*options: str, num: int = 5) -> np.ndarray:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        assert sample.main([str(run), "--num", str(num), "--steps", "2", "--out", str(out), *options]) == 0
        with np.load(out) as archive:
            return np.array(archive["arr_0"])

    every, bees = drawn("--class", "all"), drawn("--class", "bee")
    assert (drawn() == every).all()
    assert (drawn("--class", "1") == bees).all()
    assert (drawn(num=70)[:5] == every).all()
    same = [bool((one == other).all()) for one, other in zip(every, bees, strict=True)]
    assert same == [False, True, False, False, True]
    assert "drawing 5 images of 8 x 8 from step 6, all of class 1" in capfd.readouterr().err
    nobody = drawn("--class", "cow", "--guidance", "0")
    assert (nobody == drawn("--guidance", "0")).all(), "unconditional, whatever the class"
    assert (nobody != every).any()
    assert (drawn("--class", "bee", "--guidance", "2") != bees).any()
    assert sample.main([str(run), "--class", "wasp"]) == 78
    message = "error: --class wasp: there is no such class; valid: all, 0 to 2, ape, bee, cow"
    assert capfd.readouterr().err.splitlines()[-1] == message


def test_an_image_of_another_class_is_not_put_beside_those_that_are_drawn(
    tmp_path: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images.npz"
    command = [str(run), "--num", "70", "--steps", "2", "--out", str(out)]
    original = Drawing.block

    def stop_at_the_second(self: Drawing, block: int, on_step: Any) -> Tensor:
        if block == 1:
            raise StopRequested
        return original(self, block, on_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawing, "block", stop_at_the_second)
        assert sample.main([*command, "--class", "ape"]) == 75
    assert sample.main([*command, "--class", "ape", "--guidance", "2"]) == 78
    assert re.search(r" guidance: .* -> 2\.0\. ", capfd.readouterr().err)
    assert sample.main([*command, "--class", "bee"]) == 78
    assert "class: 0 -> 1" in capfd.readouterr().err
    assert sample.main([*command, "--class", "ape"]) == 0


def test_it_does_not_go_on_with_other_classes(tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / "pictures"
    for path in folder.glob("*/*.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    train(1, tmp_path, *RUN, f"data.root={copy}", "train.max_steps=3")
    (copy / "bee").rename(copy / "wasp")
    with start(1, tmp_path, *RUN, f"data.root={copy}") as job:
        assert job.wait() == [65]
        assert "(class_names: ['ape', 'bee', 'cow'] -> ['ape', 'cow', 'wasp'])" in job.output()
    (copy / "wasp").rename(copy / "bee")
    with start(1, tmp_path, *RUN, f"data.root={copy}", "model.class_labels=false", "preview.guidance=1") as job:
        assert job.wait() == [78]
        assert "model.class_labels: true -> false" in job.output()

"""The class of a drawn image follows from its index alone, and a grid has one row for each class."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.predictions import StartPrediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS, SamplerOptions
from ddpm_dist.diffusion.schedules import linear_betas
from ddpm_dist.errors import ConfigError
from ddpm_dist.evaluation.class_flags import ClassChoice, add_class_flags, class_choice, number_of
from ddpm_dist.evaluation.classes import Classes
from ddpm_dist.evaluation.generate import generate_blocks


def grey_of_class(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Predicts an image whose grey is its label, in steps of 0.2 from -1 up."""
    return torch.ones_like(x_t) * (labels.view(-1, 1, 1, 1) * 0.2 - 1)


def drawn(num: int, classes: Classes, first_block: int = 4) -> list[int]:
    """The classes that `num` drawn images show."""
    process = GaussianDiffusion(linear_betas(20))
    blocks = generate_blocks(
        Denoiser(grey_of_class, process, StartPrediction(process), clip=True),
        process,
        SAMPLERS["ddim"],
        shape=(1, 4, 4),
        num=num,
        seed=0,
        options=SamplerOptions(steps=2),
        device=torch.device("cpu"),
        on_step=lambda: None,
        block_size=first_block,
        classes=classes,
    )
    return [round(image.double().mean().item() / 25.5) for block in blocks for image in block]


def test_class_follows_from_the_index_whatever_the_number_asked_for() -> None:
    many = drawn(11, Classes(3))
    assert many == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert drawn(5, Classes(3)) == many[:5]
    assert drawn(11, Classes(3), first_block=7) == many
    assert drawn(6, Classes(3, only=2)) == [2] * 6


@pytest.mark.parametrize(
    ("num", "columns", "rows"),
    [
        (6, 2, [[0, 3], [1, 4], [2, 5]]),
        (7, 3, [[0, 3, 6], [1, 4, None], [2, 5, None]]),
        (4, 2, [[0, 3], [1, None], [2, None]]),
        (3, None, [[0, 1, 2]]),
        (2, None, [[0, 1]]),
    ],
)
def test_a_grid_has_one_row_for_each_class(num: int, columns: int | None, rows: list[list[int | None]]) -> None:
    images = torch.arange(1, num + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    shown, found = Classes(3).in_rows(images)
    assert found == columns
    expected = [0 if index is None else index + 1 for row in rows for index in row]
    assert shown[:, 0, 0, 0].tolist() == expected
    assert Classes(3, only=1).in_rows(images) == (images, None)


def test_a_class_is_called_by_its_name_or_its_number() -> None:
    clothes = ("T-shirt", "Bag", "Boot")
    assert [number_of(name, 3, clothes) for name in ("Bag", "1", "0", "Boot")] == [1, 1, 0, 2]
    assert [number_of(name, 3, ()) for name in ("2", "0")] == [2, 0]
    folders = ("1", "2", "ape")
    assert [number_of(name, 3, folders) for name in ("1", "2", "ape")] == [0, 1, 2]
    for name, names, valid in (
        ("3", clothes, "all, 0 to 2, T-shirt, Bag, Boot"),
        ("bag", clothes, "all, 0 to 2, T-shirt, Bag, Boot"),
        ("0", folders, "all, 1, 2, ape"),
        ("-1", (), "all, 0 to 2"),
    ):
        with pytest.raises(ConfigError, match=f"--class {name}: there is no such class; valid: {valid}$"):
            number_of(name, 3, names)
    with pytest.raises(ConfigError, match=r"c19, \.\.\. \(40 in all\)$"):
        number_of("dog", 40, [f"c{number}" for number in range(40)])


def run(num_classes: int = 3, label_dropout: float = 0.1) -> Any:
    model = SimpleNamespace(label_dropout=label_dropout)
    process = GaussianDiffusion(linear_betas(20))
    facts = {"num_classes": num_classes, "class_names": (), "path": "runs/x", "process": process}
    return SimpleNamespace(config=SimpleNamespace(model=model), **facts)


def test_what_the_flags_ask_of_a_run() -> None:
    assert ClassChoice().classes(run()) == ClassChoice("all").classes(run()) == Classes(3)
    assert ClassChoice("1", 3.0, (0, 19)).classes(run()) == Classes(3, 1)
    assert ClassChoice().classes(run(num_classes=0)) is None
    assert ClassChoice("1").classes(run(label_dropout=0.0)) == Classes(3, 1)


@pytest.mark.parametrize(
    ("choice", "of", "message"),
    [
        (ClassChoice("1"), run(0), "--class 1: runs/x was trained without labels; leave --class out"),
        (ClassChoice(None, 2.5), run(0), "--guidance 2.5: runs/x was trained without labels; leave --guidance out"),
        (ClassChoice(None, 0.0), run(3, 0.0), "--guidance 0: must be 1, since runs/x was trained with model.label_dro"),
        (ClassChoice("7"), run(), "--class 7: there is no such class; valid: all, 0 to 2"),
        (ClassChoice(None, 2.0, (5, 20)), run(), "--guidance-interval 5 20: expected two timesteps in 0 to 19"),
        (ClassChoice(None, 2.0, (9, 5)), run(), "--guidance-interval 9 5: expected two timesteps in 0 to 19"),
    ],
)
def test_what_a_run_cannot_do_is_refused(choice: ClassChoice, of: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choice.classes(of)
    assert str(caught.value).startswith(message)


def parsed(*argv: str) -> ClassChoice:
    parser = argparse.ArgumentParser()
    add_class_flags(parser)
    return class_choice(parser.parse_args(argv))


def test_flags_are_read_and_what_no_run_can_do_is_refused() -> None:
    assert parsed() == ClassChoice()
    assert parsed("--class", "7", "--guidance", "3", "--guidance-interval", "2", "9") == ClassChoice("7", 3.0, (2, 9))
    for argv, message in (
        (("--guidance", "-1"), "--guidance -1: expected a number of at least 0"),
        (("--guidance", "nan"), "--guidance nan: expected a number of at least 0"),
        (("--guidance-interval", "2", "9"), "--guidance-interval 2 9: needs a --guidance other than 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            parsed(*argv)

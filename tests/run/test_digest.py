"""The digests see every bit of every part of a state, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from harness import train

from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.digest import digests
from ddpm_dist.run.store import CheckpointStore

PARTS = {"weights": "model", "ema": "ema", "optimizer": "optimizer", "scaler": "scaler"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    run = train(1, tmp_path_factory.mktemp("run"), "train.max_steps=2", "train.precision=fp16")
    return CheckpointStore(run / "checkpoints").load(2)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all tensors and plain values."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list | tuple):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [path]


def perturbed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        changed = value.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[-1:].view(torch.uint8)[0] ^= 1  # the lowest bit of the last element
        return changed
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return (value, "changed")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.slow
def test_any_change_in_a_part_changes_its_digest_and_no_other(checkpoint: Checkpoint, part: str) -> None:
    before = digests(checkpoint)
    paths = leaves(getattr(checkpoint, PARTS[part]))
    assert len(paths) > 3, "there is something to perturb"
    for path in paths:
        changed = copy.deepcopy(checkpoint)
        place = getattr(changed, PARTS[part])
        for key in path[:-1]:
            place = place[key]
        if isinstance(place, tuple):
            continue  # Adam's betas: no item of a tuple can be set
        place[path[-1]] = perturbed(place[path[-1]])
        after = digests(changed)
        assert {name for name in before if before[name] != after[name]} == {part}, path


def test_the_step_counts(checkpoint: Checkpoint) -> None:
    changed = dataclasses.replace(checkpoint, step=checkpoint.step + 1)
    assert digests(changed) != digests(checkpoint)


def test_further_averages_count_as_the_first_one_does(checkpoint: Checkpoint) -> None:
    changed = dataclasses.replace(checkpoint, averages={"slow": checkpoint.ema})
    assert digests(changed) == digests(checkpoint) | {"ema": digests(changed)["ema"]}
    assert digests(changed)["ema"] != digests(checkpoint)["ema"]


def test_memory_layout_and_order_of_keys_do_not_count(checkpoint: Checkpoint) -> None:
    model = {
        name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in reversed(list(checkpoint.model.items()))
    }
    changed = dataclasses.replace(checkpoint, model=model)
    assert digests(changed) == digests(checkpoint)


def test_every_field_that_training_goes_on_from_is_in_it() -> None:
    """A new field of a checkpoint must be put into a digest, or into this list with a reason."""
    outside = {
        "window": "what was measured since the last line of the log",
        "format": "how it is written down",
        "config": "compared key by key",
        "contract": "compared key by key",
    }
    assert {*PARTS.values(), "averages", "step", *outside} == set(Checkpoint.__dataclass_fields__)

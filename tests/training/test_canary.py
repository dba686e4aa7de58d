"""The canary: the same wherever a run goes on to the bit, another one where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Job

from ddpm_dist.config import load_config
from ddpm_dist.data.in_memory import ImagesInMemory
from ddpm_dist.parallel.environment import read_environment
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.training.assembly import build_trainer
from ddpm_dist.training.canary import canary
from ddpm_dist.training.precision import Numerics, resolve
from ddpm_dist.training.step import Trainer

OPTIONS = ("elastic.mode=bitwise", "model.channels=16", "model.dropout=0.1", "train.precision=fp32")


def trainer(*overrides: str, numerics: Numerics | None = None) -> Trainer:
    config = load_config(None, [*OPTIONS, *overrides])
    ranks = Ranks(read_environment(), torch.device("cpu"), 30.0, lambda: False)
    return build_trainer(config, ranks, numerics or resolve(config.train, ranks.device), (1, 28, 28))


def digest_of(one: Trainer, seed: int = 0) -> str:
    images = ImagesInMemory(np.zeros((256, 1, 28, 28), dtype=np.uint8))
    return canary(one, images, seed, num_timesteps=1000)


def print_canaries() -> int:
    """A rank of the harness: at one thread, at two, and at one again."""
    one = trainer()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        print("canary", digest_of(one), flush=True)
    one.ranks.leave()
    return 0


def canaries(world_size: int, tmp_path: Path) -> list[str]:
    with Job(world_size, tmp_path / f"{world_size}.log", print_canaries, ()) as job:
        assert job.wait(60) == [0] * world_size, job.output()
    return [line.split()[1] for line in job.output().splitlines() if line.startswith("canary ")]


def test_it_flags_a_thread_count_and_stays_silent_for_a_number_of_ranks(tmp_path: Path) -> None:
    one, two, again = canaries(1, tmp_path)
    assert one == again
    assert one != two, "two threads add up in another order"
    assert sorted(canaries(2, tmp_path)) == sorted([one, two, one] * 2)


@pytest.mark.parametrize("change", ["model.dropout=0.2", "run.seed=1", "data.batch_size=256", "train.precision=bf16"])
def test_it_flags_what_shapes_a_gradient(change: str) -> None:
    seed = 1 if change == "run.seed=1" else 0
    assert digest_of(trainer(change), seed) != digest_of(trainer())


def test_it_flags_a_memory_format_only_where_that_rounds_otherwise_and_leaves_no_trace() -> None:
    one = trainer()
    before = [parameter.clone() for parameter in one.model.parameters()]
    assert digest_of(one) == digest_of(one)
    assert all(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in one.model.parameters())


def zero_at_first() -> Trainer:
    """The last convolutions of the middle block and of the network are zero, as in UNet2DModel here."""
    one = trainer()
    for layer in last_convolutions(one):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return one


def last_convolutions(one: Trainer) -> tuple[Any, Any]:
    network: Any = one.model
    return network.mid.conv2, network.out_conv


def test_it_flags_how_layers_round_that_a_last_layer_of_zeros_hides_and_leaves_the_zeros() -> None:
    one, other = zero_at_first(), zero_at_first()
    network: Any = other.model
    with torch.no_grad():
        network.mid.time_proj.weight.mul_(1 + 2**-20)
    assert digest_of(one) == digest_of(zero_at_first())
    assert digest_of(one) != digest_of(other)
    assert not any(layer.weight.any() for layer in last_convolutions(one))


def test_no_weight_of_the_reference_network_starts_at_zero() -> None:
    """So its canary is the one that its runs began with."""
    assert all(weight.any() for weight in trainer().model.parameters() if weight.ndim >= 2)

"""Derived seeds: the same everywhere and for ever, another one for other parts."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch

from ddpm_dist.randomness import derive_seed, generator, seed_default_generators

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("parts", "seed"), [((0, "sample", 0), 1149313249723349118), ((7, "dropout", 123, 4), 6468451654238526184)]
)
def test_seed_of_given_parts_never_changes(parts: tuple[int | str, ...], seed: int) -> None:
    """A format guarantee: another number would give every resumed run other noise and other images."""
    assert derive_seed(*parts) == seed


def test_seed_is_the_same_in_a_process_with_other_string_hashes() -> None:
    code = "from ddpm_dist.randomness import derive_seed; print(derive_seed(3, 'noise', 'x'))"
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(out.stdout) == derive_seed(3, "noise", "x")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("1",), (1,)),
        (("a", "bc"), ("ab", "c")),
        (("a", "b"), ("a\x1fstr:b",)),
        (("a", "b"), ('a", "b',)),
        ((1, 23), (12, 3)),
        ((1, 2), (2, 1)),
        ((1,), (1, 0)),
        (("",), ()),
        ((0,), (-1,)),
        ((1,), (-1,)),
        ((0,), (2**64,)),
    ],
    ids=str,
)
def test_other_parts_give_another_seed(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert derive_seed(*one) != derive_seed(*other)


def test_neighbouring_parts_share_no_seed_and_all_fit_torch() -> None:
    seeds = [derive_seed(*parts) for parts in product(range(4), ["noise", "t", "sample"], range(200), range(8))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # the whole range is used


def test_generator_is_fixed_by_its_parts_and_is_its_own() -> None:
    state = torch.random.get_rng_state()
    first, again, other = generator(1, "noise", 2), generator(1, "noise", 2), generator(1, "noise", 3)
    drawn = torch.randn(5, generator=first)
    assert first.initial_seed() == derive_seed(1, "noise", 2)
    assert torch.equal(drawn, torch.randn(5, generator=again))
    assert not torch.equal(drawn, torch.randn(5, generator=other))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeding_the_default_generators_equals_manual_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(5, "dropout", 6, 7))
        torch.randn(3)
        expected = torch.random.get_rng_state(), torch.rand(4), torch.nn.functional.dropout(torch.ones(50))
        torch.manual_seed(0)
        seed_default_generators(CPU, 5, "dropout", 6, 7)
        torch.randn(3)
        ours = torch.random.get_rng_state(), torch.rand(4), torch.nn.functional.dropout(torch.ones(50))
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))


def test_seeding_the_default_generators_wipes_what_was_drawn_before() -> None:
    with torch.random.fork_rng(devices=[]):
        seed_default_generators(CPU, 1)
        first = torch.rand(4)
        torch.randn(3)  # an odd number leaves half of a Box-Muller pair behind
        seed_default_generators(CPU, 1)
        assert torch.equal(torch.rand(4), first)
        seed_default_generators(CPU, 2)
        assert not torch.equal(torch.rand(4), first)

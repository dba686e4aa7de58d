"""Averages of other widths from stored ones: the oracle is written from the paper, in float64, step by step.

Karras et al. 2024 (arXiv:2312.02696): the profile in eq. 2, its width in eq. 4, the stored average in eq. 3, the
solution in appendix C. The oracle knows no closed form: it sums profiles over a fine grid of time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_dist.config import MAX_WIDTH
from ddpm_dist.models.averages import PowerEMA
from ddpm_dist.models.reconstruction import Profile, combine, exponent_of, solve_weights

STEPS, EVERY, KEPT = 240, 12, (0.05, 0.1)
WIDTHS = (0.06, 0.075, 0.09, 0.12)
GRID = (np.arange(400_000) + 0.5) / 400_000  # τ / t of the middle of each interval


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, MAX_WIDTH])
def test_the_profile_has_the_width(width: float) -> None:
    """σ_rel is the standard deviation of p(τ) = (γ + 1) τ^γ on [0, 1]."""
    profile = (exponent_of(width) + 1) * GRID ** exponent_of(width)
    assert profile.mean() == pytest.approx(1, rel=1e-6)
    mean = (profile * GRID).mean()
    assert np.sqrt((profile * (GRID - mean) ** 2).mean()) == pytest.approx(width, rel=1e-6)


def discrete_profile(profile: Profile) -> np.ndarray:
    """The weight of each step in the stored average, float64 [STEPS], by running the recursion of eq. 3."""
    weights = np.zeros(STEPS)
    for n in range(1, profile.step + 1):
        decay = (1 - 1 / n) ** (exponent_of(profile.width) + 1)
        weights *= decay
        weights[n - 1] += 1 - decay
    return weights


def test_the_factors_are_the_least_squares_fit_of_the_profiles() -> None:
    """Against an explicit fit on a grid of 400,000 times, by the normal equations."""
    stored = [Profile(step, width) for step in range(60, STEPS + 1, 60) for width in KEPT]
    wanted = Profile(STEPS, 0.08)

    def on_grid(profile: Profile) -> np.ndarray:
        gamma, share = exponent_of(profile.width), profile.step / STEPS
        inside = np.minimum(GRID / share, 1)
        return np.where(share > GRID, (gamma + 1) / share * inside**gamma, 0)

    table = np.stack([on_grid(profile) for profile in stored])
    expected = np.linalg.lstsq(table.T, on_grid(wanted), rcond=None)[0]
    assert solve_weights(stored, wanted) == pytest.approx(list(expected), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_combined_profile_is_the_wanted_one(width: float) -> None:
    stored = [Profile(step, kept) for step in range(EVERY, STEPS + 1, EVERY) for kept in KEPT]
    factors = solve_weights(stored, Profile(STEPS, width))
    combined = sum(f * discrete_profile(profile) for f, profile in zip(factors, stored, strict=True))
    wanted = discrete_profile(Profile(STEPS, width))
    assert np.linalg.norm(combined - wanted) < 0.01 * np.linalg.norm(wanted)


def test_a_stored_average_is_its_own_reconstruction() -> None:
    stored = [Profile(step, width) for step in (10, 20, 30) for width in KEPT]
    assert solve_weights(stored, Profile(30, 0.1)) == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-9)


def walk(model: nn.Linear, step: int) -> None:
    """Stands in for training: weights that drift, and jitter from step to step."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        model.weight.mul_(0.995).add_(torch.randn(model.weight.shape, generator=draw), alpha=0.01)


@pytest.fixture(scope="module")
def history() -> tuple[list[Tensor], list[tuple[Profile, Tensor]]]:
    """The weights after each step, float64, and the stored averages, which the package has kept in float32."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    averages = {width: PowerEMA(model, width) for width in KEPT}
    seen, stored = [], []
    for step in range(STEPS):
        walk(model, step)
        seen.append(model.weight.detach().double())
        for average in averages.values():
            average.update(step)
        if (step + 1) % EVERY == 0:
            stored += [
                (Profile(step + 1, width), average.state_dict()["weight"].half()) for width, average in averages.items()
            ]
    return seen, stored


@pytest.mark.parametrize("width", KEPT)
def test_an_average_is_the_weighted_sum_of_the_steps(
    width: float, history: tuple[list[Tensor], list[tuple[Profile, Tensor]]]
) -> None:
    """The weight of step n is the integral of p over (n - 1, n): (n^(γ+1) - (n-1)^(γ+1)) / t^(γ+1)."""
    seen, _ = history
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    average = PowerEMA(model, width)
    for step in range(STEPS):
        walk(model, step)
        average.update(step)
    powers = (np.arange(STEPS + 1) / STEPS) ** (exponent_of(width) + 1)
    expected = sum(float(w) * weights for w, weights in zip(np.diff(powers), seen, strict=True))
    torch.testing.assert_close(average.state_dict()["weight"].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_reconstructed_average_is_the_directly_kept_one(
    width: float, history: tuple[list[Tensor], list[tuple[Profile, Tensor]]]
) -> None:
    """From 20 snapshots in half precision, to 1e-3 of its norm."""
    seen, stored = history
    direct = torch.tensordot(torch.from_numpy(discrete_profile(Profile(STEPS, width))), torch.stack(seen), dims=1)
    factors = solve_weights([profile for profile, _ in stored], Profile(STEPS, width))
    (solved,) = combine([{"weight": state} for _, state in stored], factors).values()
    assert (solved.double() - direct).norm() < 1e-3 * direct.norm()


def test_the_first_update_forgets_the_random_start() -> None:
    model = nn.Linear(4, 4)
    average = PowerEMA(model, 0.1)
    nn.init.constant_(model.weight, 1.0)
    average.update(0)
    assert torch.equal(average.state_dict()["weight"], model.state_dict()["weight"])


def test_combining_adds_in_float64_and_keeps_what_is_no_number() -> None:
    one, count = {"a": torch.tensor([1.0], dtype=torch.float16)}, torch.tensor(7)
    solved = combine([one | {"n": torch.tensor(3)}, {"a": torch.tensor([1e-9]), "n": count}], [2.0, 1.0])
    assert solved["a"].dtype == torch.float32
    assert solved["n"] is count
    assert solved["a"].item() == pytest.approx(2.0)

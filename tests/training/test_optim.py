"""The learning rate is a function of the step alone; the optimizer is plain Adam, or AdamW."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from ddpm_dist.config import OptimConfig
from ddpm_dist.training.optim import build_optimizer, learning_rate

PEAK, WARMUP, DECAY = 3e-3, 10, 50


def rates(optim: OptimConfig, num: int = DECAY + 20) -> list[float]:
    return [learning_rate(step, optim, DECAY) for step in range(num)]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_is_a_line_that_starts_above_zero_and_reaches_the_peak(schedule: str) -> None:
    optim = OptimConfig(lr=PEAK, schedule=schedule, warmup_steps=WARMUP)  # type: ignore[arg-type]
    expected = [PEAK * (i + 1) / WARMUP for i in range(WARMUP)]
    assert rates(optim)[:WARMUP] == pytest.approx(expected)
    assert rates(optim)[WARMUP] == pytest.approx(PEAK)
    assert max(rates(optim)) == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warmup_the_first_update_has_the_peak_rate(schedule: str) -> None:
    assert learning_rate(0, OptimConfig(lr=PEAK, schedule=schedule), DECAY) == PEAK  # type: ignore[arg-type]


def test_default_is_the_reference_recipes_constant() -> None:
    assert {learning_rate(step, OptimConfig(), 1) for step in (0, 1, 10, 10**6)} == {2e-4}


def test_constant_stays_at_the_peak_whatever_the_last_step() -> None:
    optim = OptimConfig(lr=PEAK, warmup_steps=WARMUP)
    assert {learning_rate(step, optim, last) for step in range(WARMUP, 200) for last in (1, DECAY)} == {PEAK}


@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_cosine_falls_from_the_peak_over_half_of_it_to_zero_and_stays(warmup: int) -> None:
    optim = OptimConfig(lr=PEAK, schedule="cosine", warmup_steps=warmup)
    assert learning_rate(warmup, optim, DECAY) == pytest.approx(PEAK)
    assert learning_rate((warmup + DECAY) // 2, optim, DECAY) == pytest.approx(PEAK / 2)
    assert [learning_rate(step, optim, DECAY) for step in (DECAY, DECAY + 1, 10 * DECAY)] == [0.0, 0.0, 0.0]
    falling = [learning_rate(step, optim, DECAY) for step in range(warmup, DECAY + 1)]
    assert all(later < earlier for earlier, later in pairwise(falling))


def test_cosine_is_flat_at_both_ends_and_symmetric() -> None:
    falling = rates(OptimConfig(lr=PEAK, schedule="cosine"), DECAY + 1)
    assert [a + b for a, b in zip(falling, reversed(falling), strict=True)] == pytest.approx([PEAK] * (DECAY + 1))
    drops = [earlier - later for earlier, later in pairwise(falling)]
    assert max(drops) == pytest.approx(drops[DECAY // 2])
    assert drops[0] < max(drops) / 10


def test_rate_depends_on_the_step_alone_and_not_on_what_was_asked_before() -> None:
    optim = OptimConfig(lr=PEAK, schedule="cosine", warmup_steps=WARMUP)
    forwards = {step: learning_rate(step, optim, DECAY) for step in range(DECAY + 5)}
    backwards = {step: learning_rate(step, optim, DECAY) for step in reversed(range(DECAY + 5))}
    assert forwards == backwards


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_is_adam_with_its_usual_constants(fused: bool) -> None:
    model = nn.Linear(2, 3)
    optimizer = build_optimizer(model, OptimConfig(lr=PEAK, fused=fused))
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "fused")} == {
        "lr": PEAK,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "amsgrad": False,
        "fused": fused,
    }
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in model.parameters()}


def test_first_update_moves_each_weight_by_the_rate_against_its_gradient() -> None:
    """Adam's bias correction makes the first update lr · sign(gradient), whatever the gradient's size."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(model, OptimConfig(lr=PEAK))
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[5.0, -0.01]])
    optimizer.step()
    torch.testing.assert_close(model.weight.detach() - before, torch.tensor([[-PEAK, PEAK]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_keys_reach_the_optimizer(name: str, fused: bool) -> None:
    keys = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.03, "fused": fused}
    optimizer = build_optimizer(nn.Linear(2, 3), OptimConfig(name=name, **keys))  # type: ignore[arg-type]
    assert type(optimizer) is {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    (group,) = optimizer.param_groups
    assert [group[key] for key in ("betas", "eps", "weight_decay", "fused")] == [(0.8, 0.95), 1e-5, 0.03, fused]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_updates_are_those_of_the_paper(name: str, fused: bool) -> None:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, number by number in float64, at changing rates."""
    beta1, beta2, eps, decay = 0.8, 0.95, 1e-3, 0.3 if name == "adamw" else 0.0
    model = nn.Linear(3, 1, bias=False)
    keys = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay, "fused": fused}
    optimizer = build_optimizer(model, OptimConfig(name=name, **keys))  # type: ignore[arg-type]
    weights = model.weight.detach().double().flatten().tolist()
    means, squares = [0.0] * 3, [0.0] * 3
    for step, rate in enumerate([0.1, 0.2, 0.05, 0.0, 0.3], start=1):
        gradient = torch.randn(1, 3, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for i, g in enumerate(gradient.double().flatten().tolist()):
            means[i] = beta1 * means[i] + (1 - beta1) * g
            squares[i] = beta2 * squares[i] + (1 - beta2) * g * g
            mean, square = means[i] / (1 - beta1**step), squares[i] / (1 - beta2**step)
            weights[i] -= rate * (mean / (square**0.5 + eps) + decay * weights[i])
    torch.testing.assert_close(model.weight.detach().flatten(), torch.tensor(weights), rtol=1e-5, atol=1e-6)

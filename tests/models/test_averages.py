"""The average of the weights: its closed form, its independence of the model, and save/load."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ddpm_dist.models.averages import EMA
from ddpm_dist.models.unet import UNet


def small_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(channels=8, time_embed_dim=8)


@torch.no_grad()
def move(model: nn.Module, step: int) -> None:
    """Stands in for the optimizer: other weights at each step, in place."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("decay", "first_step"),
    [(0.9999, 0), (0.5, 0), (0.0, 0), (0.9, 1000)],
    ids=["warming up", "warm-up ends within", "no average", "long after the warm-up"],
)
def test_average_has_its_closed_form(decay: float, first_step: int) -> None:
    """θ̄_n = Π d_s θ_init + Σ_s (1 - d_s) (Π_{u > s} d_u) θ_s, with d_s = min(decay, (1 + s) / (10 + s))."""
    model, num = small_model(), 30
    ema = EMA(model, decay)
    seen = [copy_of(model.state_dict())]
    steps = range(first_step, first_step + num)
    for step in steps:
        move(model, step)
        ema.update(step)
        seen.append(copy_of(model.state_dict()))

    decays = [min(decay, (1 + step) / (10 + step)) for step in steps]
    factors = [1.0, *(1 - d for d in decays)]
    for i in range(len(factors)):
        for later in decays[i:]:
            factors[i] *= later
    assert sum(factors) == pytest.approx(1)  # it is an average
    for name, value in ema.state_dict().items():
        expected = sum(f * weights[name].double() for f, weights in zip(factors, seen, strict=True))
        # 30 roundings of float32 at a magnitude of up to about 20.
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-5)


def test_first_update_forgets_nine_tenths_of_the_random_start() -> None:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 0.0)
    ema = EMA(model, 0.9999)
    nn.init.constant_(model.weight, 1.0)
    ema.update(0)
    assert ema.state_dict()["weight"].item() == pytest.approx(0.9)


def test_state_dict_has_the_models_keys_and_shapes() -> None:
    model = small_model()
    state = EMA(model, 0.9).state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_average_starts_as_the_model_and_owns_its_memory() -> None:
    model = small_model()
    ema = EMA(model, 0.9)
    start = copy_of(model.state_dict())
    assert equal(ema.state_dict(), start)
    move(model, 1)
    assert equal(ema.state_dict(), start)


def test_update_leaves_the_model_untouched() -> None:
    model = small_model()
    ema = EMA(model, 0.9)
    move(model, 1)
    before = copy_of(model.state_dict())
    ema.update(0)
    assert equal(model.state_dict(), before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_average_takes_no_gradient_and_is_in_evaluation_mode() -> None:
    ema = EMA(small_model().train(), 0.9)
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not any(module.training for module in ema.model.modules())
    out = ema.model(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long))
    assert not out.requires_grad


def test_update_between_forward_and_backward_leaves_the_graph_whole() -> None:
    model = small_model()
    ema = EMA(model, 0.9)
    loss = model(torch.ones(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)).square().mean()
    ema.update(0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_on_after_save_and_load_is_exact() -> None:
    model = small_model()
    undisturbed = EMA(model, 0.9)
    for step in range(5):
        move(model, step)
        undisturbed.update(step)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "ema": undisturbed.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    model_again = small_model()
    resumed = EMA(model_again, 0.9)
    model_again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["ema"])
    assert equal(resumed.state_dict(), undisturbed.state_dict())
    for step in range(5, 10):
        for each, average in ((model, undisturbed), (model_again, resumed)):
            move(each, step)
            average.update(step)
    assert equal(resumed.state_dict(), undisturbed.state_dict())


def test_average_closes_in_on_weights_that_rest() -> None:
    model = small_model()
    ema = EMA(model, 0.5)
    move(model, 1)
    distances = []
    for step in range(10):
        ema.update(step)
        pairs = zip(ema.model.parameters(), model.parameters(), strict=True)
        distances.append(sum(float((a - b.detach()).abs().sum()) for a, b in pairs))
    assert all(later < earlier for earlier, later in pairwise(distances))

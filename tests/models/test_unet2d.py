"""unet2d is UNet2DModel of diffusers, weight by weight, with the initialisation of Ho et al."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import state_differences, train
from torch import Tensor, nn

from ddpm_dist.build import build_model, check_names
from ddpm_dist.config import load_config
from ddpm_dist.config.unet2d import UNet2DConfig
from ddpm_dist.models.unet import UNet

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402

from ddpm_dist.models import unet2d  # noqa: E402

SMALL = (
    "model.name=unet2d",
    "unet2d.block_out_channels=[8, 16]",
    "unet2d.down_block_types=[DownBlock2D, AttnDownBlock2D]",
    "unet2d.up_block_types=[AttnUpBlock2D, UpBlock2D]",
    "unet2d.norm_num_groups=4",
    "unet2d.layers_per_block=1",
)


def small(*overrides: str, num_classes: int = 0) -> Any:
    config = load_config(None, [*SMALL, *overrides])
    return build_model(config, (3, 8, 8), num_classes, torch.device("cpu"), channels_last=False)


def batch(num: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(num, 3, 8, 8, generator=draw), torch.tensor([0, 500, 999])[:num]


def test_each_key_has_the_name_and_the_default_that_it_has_in_diffusers() -> None:
    theirs = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    ours = {item.name: item.default for item in dataclasses.fields(UNet2DConfig)}
    assert ours.pop("zero_init") is True
    assert {name: theirs[name].default for name in ours} == ours
    assert set(unet2d.KEYS) == set(ours)
    left_out = {"sample_size", "in_channels", "out_channels", "num_class_embeds"}  # these follow from the data
    left_out |= {"center_input_sample", "time_embedding_type", "mid_block_type", "class_embed_type"}
    assert set(theirs) - set(ours) == {"self", "num_train_timesteps"} | left_out


@pytest.mark.parametrize("num_classes", [0, 5])
def test_it_computes_what_diffusers_computes_with_the_same_weights(num_classes: int) -> None:
    model = small("unet2d.zero_init=false", num_classes=num_classes)
    plain = diffusers.UNet2DModel.from_config(diffusers.UNet2DModel.from_config(model.config).config)
    plain.load_state_dict(model.state_dict())  # strict: the names are the same
    x, t = batch()
    labels = torch.tensor([0, 4, 5]) if num_classes else None
    given = {} if labels is None else {"labels": labels}
    assert torch.equal(model(x, t, **given), plain(x, t, class_labels=labels).sample)
    if labels is not None:
        assert model.class_embedding.weight.shape[0] == num_classes + 1, "the last row is that of the null label"
        assert not torch.equal(model(x, t, labels=labels), model(x, t, labels=labels.flip(0)))


def test_zero_init_zeroes_what_ho_et_al_zero_and_nothing_else() -> None:
    drawn, zeroed = small("unet2d.zero_init=false"), small()
    blocks = [name for name, module in zeroed.named_modules() if isinstance(module, ResnetBlock2D)]
    attentions = [name for name, module in zeroed.named_modules() if isinstance(module, Attention)]
    assert (len(blocks), len(attentions)) == (2 + 2 + 4, 1 + 1 + 2)
    zero = [*(f"{name}.conv2" for name in blocks), *(f"{name}.to_out.0" for name in attentions), "conv_out"]
    expected = {f"{name}.{kind}" for name in zero for kind in ("weight", "bias")}
    before, after = drawn.state_dict(), zeroed.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == expected
    assert all(not after[name].any() for name in expected)
    assert not zeroed(*batch()).any(), "at first it predicts zero"


@pytest.mark.parametrize("num_classes", [0, 5])
def test_every_weight_gets_a_gradient(num_classes: int) -> None:
    model = small(num_classes=num_classes)
    given = {"labels": torch.tensor([0, 4, 5])} if num_classes else {}
    model(*batch(), **given).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_combination_that_only_diffusers_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not like\nthis")

    monkeypatch.setattr(unet2d.UNet2D, "forward", refuse)
    with pytest.raises(ValueError, match=r"^unet2d: diffusers refuses this network \(RuntimeError: not like this\)$"):
        check_names(load_config(None, SMALL))


def test_the_check_takes_no_numbers_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    check_names(load_config(None, ["model.name=unet2d"]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [lambda: small("unet2d.dropout=0.3", "unet2d.zero_init=false"),
                                  lambda: UNet(3, 8, 8, dropout=0.3)], ids=["unet2d", "unet"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_checkpointing_changes_no_bit_and_computes_each_block_twice(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = make()
    calls: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda module, args, output: calls.append(module))

    def gradients() -> list[Tensor]:
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(*batch()).float().square().mean()
        found: list[Tensor] = list(torch.autograd.grad(loss, list(model.parameters())))
        return [*found, torch.rand(1)]  # the dropout of the next micro-batch is the same, too

    kept = gradients()
    num_calls = len(calls)
    model.enable_gradient_checkpointing()
    again = gradients()
    assert len(calls) > 2.5 * num_calls
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    calls.clear()
    with torch.no_grad():
        model(*batch())
    assert len(calls) == num_calls, "nothing is computed twice where no gradient is wanted"


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_when_it_is_resumed_with_gradient_checkpointing(tmp_path: Path) -> None:
    options = ("model.dropout=0.2", "elastic.mode=bitwise", "checkpoint.every=2", "train.micro_batch_size=null")
    whole = train(1, tmp_path, *options, "train.max_steps=4", name="whole")
    train(1, tmp_path, *options, "train.max_steps=2", name="moved")
    moved = train(2, tmp_path, *options, "train.max_steps=4", "train.gradient_checkpointing=true", name="moved")
    assert state_differences(whole, moved) == []

"""The reference U-Net: its size, and its forward pass against one written again from the reference text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddpm_dist.models.unet import SinusoidalTimeEmbedding, UNet

Weights = dict[str, Tensor]


def inputs(channels: int = 1, size: int = 16, num: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(3))
    return x, torch.tensor([0, 1, 500, 999, 17, 250])[:num]


def network(**options: float) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return UNet(**{"channels": 16, "time_embed_dim": 32, **options})  # type: ignore[arg-type]


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """float64, entry by entry."""
    half = dim // 2
    rows = []
    for step in t.tolist():
        angles = [step * 10000 ** (-i / (half - 1)) for i in range(half)]
        rows.append([*map(math.sin, angles), *map(math.cos, angles)])
    return torch.tensor(rows, dtype=torch.float64)


def reference_forward(weights: Weights, x: Tensor, t: Tensor, time_embed_dim: int) -> Tensor:
    """The network of the reference text in float64, with nothing but tensor algebra."""
    weights = {name: value.double() for name, value in weights.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def conv(name: str, value: Tensor) -> Tensor:
        kernel = weights[f"{name}.weight"]
        out, side = kernel.shape[0], kernel.shape[-1]
        patches = torch.nn.functional.unfold(value, side, padding=side // 2)
        flat = kernel.reshape(out, -1) @ patches + weights[f"{name}.bias"][:, None]
        return flat.view(len(value), out, *value.shape[2:])

    def norm(name: str, value: Tensor) -> Tensor:
        groups = value.reshape(len(value), 8, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        scaled = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view_as(value)
        return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    def block(name: str, value: Tensor) -> Tensor:
        h = silu(norm(f"{name}.norm1", conv(f"{name}.conv1", value)))
        h = h + linear(f"{name}.time_proj", silu(time))[:, :, None, None]
        h = silu(norm(f"{name}.norm2", conv(f"{name}.conv2", h)))
        return h + (conv(f"{name}.skip", value) if f"{name}.skip.weight" in weights else value)

    def half_size(value: Tensor) -> Tensor:
        return (value[..., ::2, ::2] + value[..., 1::2, ::2] + value[..., ::2, 1::2] + value[..., 1::2, 1::2]) / 4

    def double_size(value: Tensor) -> Tensor:
        return value.repeat_interleave(2, -1).repeat_interleave(2, -2)

    time = sinusoid(t, time_embed_dim)
    time = linear("time_embedding.3", silu(linear("time_embedding.1", time)))
    h1 = block("down1", conv("in_conv", x.double()))
    h2 = block("down2", half_size(h1))
    h3 = block("down3", half_size(h2))
    u3 = block("up3", torch.cat([block("mid", h3), h3], dim=1))
    u2 = block("up2", torch.cat([double_size(u3), h2], dim=1))
    u1 = block("up1", torch.cat([double_size(u2), h1], dim=1))
    return conv("out_conv", u1)


@pytest.mark.parametrize(("channels", "count"), [(64, 3_687_041), (32, 979_393)])
def test_parameter_count_is_that_of_the_reference(channels: int, count: int) -> None:
    with torch.device("meta"):
        model = UNet(channels=channels)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert sum(value.numel() for value in model.state_dict().values()) == count  # no table among the weights


def test_defaults_are_the_reference_recipe() -> None:
    with torch.device("meta"):
        default, explicit = UNet(), UNet(image_channels=1, channels=64, time_embed_dim=128, dropout=0.0)
    assert str(default) == str(explicit)


@pytest.mark.parametrize(("image_channels", "size"), [(1, 28), (3, 32), (3, 4)])
def test_output_has_the_images_shape(image_channels: int, size: int) -> None:
    x, t = inputs(image_channels, size)
    out = network(image_channels=image_channels)(x, t)
    assert out.shape == x.shape
    assert out.dtype == torch.float32


@pytest.mark.parametrize("dim", [4, 32, 128])
def test_time_embedding_is_the_sinusoid_with_half_minus_one(dim: int) -> None:
    t = torch.arange(1000)
    ours = SinusoidalTimeEmbedding(dim)(t)
    assert ours.shape == (1000, dim)
    assert ours.dtype == torch.float32
    # An angle of up to 999, itself in float32, is known to 999 × 6e-8 twice over.
    torch.testing.assert_close(ours.double(), sinusoid(t, dim), rtol=0, atol=1.3e-4)
    torch.testing.assert_close(ours[:20].double(), sinusoid(t[:20], dim), rtol=0, atol=3e-6)


@pytest.mark.parametrize("image_channels", [1, 3])
def test_forward_equals_the_reference_written_again(image_channels: int) -> None:
    model, (x, t) = network(image_channels=image_channels), inputs(image_channels)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.02)
        ours = model(x, t)
    expected = reference_forward(model.state_dict(), x, t, 32)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_gradients_equal_those_of_the_reference_written_again() -> None:
    """A path that carries the forward pass alone would change no output, and only slow down what is learned."""
    model, (x, t) = network(), inputs()
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    (model(x, t) * direction).sum().backward()
    (reference_forward(weights, x, t, 32) * direction).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-3, atol=1e-3, msg=name)


def test_prediction_depends_on_the_timestep() -> None:
    model, (x, _) = network(), inputs()
    early, late = (model(x, torch.full((len(x),), t)) for t in (0, 900))
    assert (early - late).abs().max() > 1e-3


def test_each_image_is_denoised_on_its_own() -> None:
    model, (x, t) = network(), inputs()
    together = model(x, t)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_dropout_is_off_at_evaluation() -> None:
    with_dropout, without = network(dropout=0.5), network()
    without.load_state_dict(with_dropout.state_dict())
    x, t = inputs()
    assert torch.equal(with_dropout.eval()(x, t), without.eval()(x, t))


def test_dropout_is_on_in_training() -> None:
    x, t = inputs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = network(dropout=0.5).train()
        assert not torch.equal(model(x, t), model(x, t))


def test_without_dropout_training_and_evaluation_agree() -> None:
    model, (x, t) = network(), inputs()
    assert torch.equal(model.train()(x, t), model.eval()(x, t))


def test_every_parameter_gets_a_gradient() -> None:
    model, (x, t) = network(image_channels=3), inputs(3)
    model(x, t).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # GroupNorm takes off what a bias adds to a whole group, but not what it adds to one channel of several.
    assert silent == []


def test_skips_carry_gradient_to_each_level_when_the_path_below_is_cut() -> None:
    model, (x, t) = network(), inputs()
    for below in (model.pool, model.mid):
        below.register_forward_hook(lambda module, args, out: out.detach())
    model(x, t).square().mean().backward()
    for level in (model.down1, model.down2, model.down3):
        assert level.conv1.weight.grad is not None
        assert level.conv1.weight.grad.abs().sum() > 0
    assert model.mid.conv1.weight.grad is None  # the cut is real


# Labels


def test_labels_add_one_embedding_and_change_no_other_weight() -> None:
    plain, labelled = network(), network(num_classes=3)
    weights, more = plain.state_dict(), labelled.state_dict()
    embedding = more.pop("label_embedding.weight")
    assert embedding.shape == (4, 32), "three classes and the null label"
    assert weights.keys() == more.keys()
    assert all(torch.equal(value, more[name]) for name, value in weights.items())


def test_a_label_shifts_the_time_embedding_by_its_row() -> None:
    labelled, (x, t) = network(num_classes=3), inputs()
    assert labelled.label_embedding is not None
    rows, bias = labelled.label_embedding.weight.detach(), "time_embedding.3.bias"
    labels = torch.tensor([0, 3, 1, 1])
    output = labelled(x, t, labels)
    for index, label in enumerate(labels.tolist()):
        shifted = network()
        shifted.load_state_dict({**shifted.state_dict(), bias: shifted.state_dict()[bias] + rows[label]})
        torch.testing.assert_close(shifted(x, t)[index], output[index])


def test_every_weight_gets_a_gradient_from_a_batch_of_one_class() -> None:
    labelled, (x, t) = network(num_classes=3), inputs()
    labelled(x, t, torch.full_like(t, 2)).square().mean().backward()
    assert all(weight.grad is not None for weight in labelled.parameters())
    assert labelled.label_embedding is not None
    rows = labelled.label_embedding.weight.grad
    assert rows is not None
    assert [bool(row.any()) for row in rows] == [False, False, True, False]

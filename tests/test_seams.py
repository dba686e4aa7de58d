"""Every place where people will add something, with a second implementation behind it.

Each second implementation is one short class or function and one line in a table; the rest of the package is the one
that users have, called by its real commands. Nothing else need change: that is what these tests prove.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import call_train, committed, final_state, metrics, start, state_differences, train
from torch import Tensor, nn

from ddpm_dist import build, loading, sample
from ddpm_dist.config import DataConfig
from ddpm_dist.data.datasets import DATASETS, DataSet
from ddpm_dist.data.in_memory import ImagesInMemory, read_mnist5k
from ddpm_dist.diffusion.denoiser import Denoise, Denoised
from ddpm_dist.diffusion.losses import LOSSES, DenoisingLoss
from ddpm_dist.diffusion.predictions import PREDICTIONS
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.diffusion.samplers import SAMPLERS, Sampler, SamplerOptions
from ddpm_dist.diffusion.schedules import SCHEDULES, linear_betas
from ddpm_dist.diffusion.timesteps import TIMESTEP_SAMPLERS
from ddpm_dist.evaluation.generate import generate_blocks
from ddpm_dist.models.averages import EMA
from ddpm_dist.models.networks import NETWORKS, Network
from ddpm_dist.training import assembly
from ddpm_dist.training.tasks import TASKS, TaskContext

RUN = ("train.max_steps=6", "checkpoint.every=2", "optim.lr=1e-3")
PICTURES = ("preview.num_images=2", "preview.steps=3", "diffusion.num_timesteps=20")


@pytest.fixture(autouse=True)
def tables() -> Any:
    """What a test enters into a table of this process is gone afterwards."""
    all_tables: Sequence[dict[str, Any]] = (
        SCHEDULES, PREDICTIONS, LOSSES, TIMESTEP_SAMPLERS, NETWORKS, SAMPLERS, DATASETS, loading.WEIGHTS,
    )  # fmt: skip
    before = [dict(table) for table in all_tables]
    yield
    for table, content in zip(all_tables, before, strict=True):
        table.clear()
        table.update(content)


def first_loss(run: Path) -> float:
    return float(metrics(run)[0]["loss"])


# A schedule


def flat_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    return torch.full((num_timesteps,), beta_end, dtype=torch.float64)


def with_flat_schedule(argv: Sequence[str]) -> int:
    SCHEDULES["flat"] = flat_betas
    return call_train([*argv, "diffusion.schedule=flat"])


def test_a_schedule(tmp_path: Path) -> None:
    run = train(1, tmp_path, *RUN, *PICTURES, function=with_flat_schedule)
    SCHEDULES["flat"] = flat_betas
    assert loading.load_run(run).process.betas.tolist() == pytest.approx([0.02] * 20)
    assert (run / "samples" / "step-00000006.png").exists()


# A prediction


class FlowPrediction:
    """The network predicts ε - x_0 (Liu et al. 2023, arXiv:2209.03003, for this process)."""

    def __init__(self, process: GaussianDiffusion) -> None:
        self.process = process

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x_start

    def to_x_start_and_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        signal, sigma = (
            table[t].view(-1, 1, 1, 1)
            for table in (self.process.sqrt_alphas_cumprod, self.process.sqrt_one_minus_alphas_cumprod)
        )
        x_start = (x_t - sigma * output) / (signal + sigma)
        return x_start, x_start + output

    def x_start_error(self, snr: Tensor) -> Tensor:
        return (1 + snr.sqrt()) ** -2


def with_flow_prediction(argv: Sequence[str]) -> int:
    PREDICTIONS["flow"] = FlowPrediction
    return call_train([*argv, "diffusion.prediction=flow", "loss.weighting=min_snr"])


def test_a_prediction(tmp_path: Path) -> None:
    run = train(1, tmp_path, *RUN, *PICTURES, function=with_flow_prediction)
    plain = train(1, tmp_path, *RUN, *PICTURES, name="plain")
    assert first_loss(run) != pytest.approx(first_loss(plain), rel=0.01)
    PREDICTIONS["flow"] = FlowPrediction
    denoiser = loading.load_run(run).denoiser(clip=False)
    x_t, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 17])
    x_start, eps = denoiser(x_t, t)[:2]
    torch.testing.assert_close(denoiser.process.q_sample(x_start, t, eps), x_t)
    assert sample.main([str(run), "--num", "2", "--steps", "3", "--out", str(tmp_path / "out.png")]) == 0


# A loss


class HalfLoss(DenoisingLoss):
    """Half of the simple loss, image by image."""

    def __call__(
        self, network: nn.Module, x_start: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        output, target = self.output_and_target(network, x_start, t, noise, cond)
        return 0.5 * (output - target).square().flatten(1).mean(1)


def with_half_loss(argv: Sequence[str]) -> int:
    LOSSES["half"] = HalfLoss
    return call_train([*argv, "loss.weighting=half"])


@pytest.mark.parametrize("mode", ["stream", "bitwise"])
def test_a_loss(tmp_path: Path, mode: str) -> None:
    options = (*RUN, f"elastic.mode={mode}")
    half, plain = train(2, tmp_path, *options, name="half", function=with_half_loss), train(1, tmp_path, *options)
    assert first_loss(half) == pytest.approx(0.5 * first_loss(plain), rel=1e-4)


# How timesteps are drawn


class FirstTimesteps:
    """Only the ten least noisy timesteps."""

    def __init__(self, num_timesteps: int) -> None:
        pass

    def draw(self, generator: torch.Generator, n: int) -> Tensor:
        return torch.randint(0, 10, (n,), generator=generator)


def with_first_timesteps(argv: Sequence[str]) -> int:
    TIMESTEP_SAMPLERS["first"] = FirstTimesteps
    return call_train([*argv, "loss.timestep_sampler=first"])


def test_a_way_to_draw_timesteps(tmp_path: Path) -> None:
    two = train(2, tmp_path, *RUN, "elastic.mode=bitwise", name="two", function=with_first_timesteps)
    one = train(1, tmp_path, *RUN, "elastic.mode=bitwise", name="one", function=with_first_timesteps)
    assert state_differences(one, two) == []
    assert first_loss(one) != pytest.approx(first_loss(train(1, tmp_path, *RUN)), rel=1e-3)


# A network, and conditioning in a batch


class LabelledNet(nn.Module):
    """One convolution, and a bias for each label."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bias = nn.Conv2d(channels, channels, 3, padding=1), nn.Embedding(num_classes, channels)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        label = torch.zeros_like(t) if label is None else label
        output: Tensor = self.conv(x) + self.bias(label)[:, :, None, None] + self.bias.weight.mean()
        return output


def with_labelled_net(argv: Sequence[str]) -> int:
    NETWORKS["labelled"] = Network(lambda model, shape, num_classes, out: LabelledNet(shape[0], num_classes or 1))
    return call_train([*argv, "model.name=labelled"])


def test_a_network(tmp_path: Path) -> None:
    run = train(2, tmp_path, *RUN, *PICTURES, function=with_labelled_net)
    assert set(final_state(run)["model"]) == {"conv.weight", "conv.bias", "bias.weight"}
    assert (run / "samples" / "step-00000006.png").exists()


class Parities(ImagesInMemory):
    """The label of an image is whether its number is odd."""

    num_classes = 2

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"label": torch.tensor(indices) % 2}


def with_labels(argv: Sequence[str]) -> int:
    DATASETS["mnist5k"] = DataSet(lambda data, channels: Parities(read_mnist5k()))
    return with_labelled_net(argv)


def test_conditioning_in_a_batch(tmp_path: Path) -> None:
    options = (*RUN, "elastic.mode=bitwise")
    runs = [train(size, tmp_path, *options, name=f"w{size}", function=with_labels) for size in (1, 2)]
    assert state_differences(*runs) == [], "labels follow their images, whoever computes the shard"
    state = final_state(runs[0])
    assert state["contract"]["num_classes"] == 2
    assert state["model"]["bias.weight"].shape == (2, 1)
    with start(1, tmp_path, *options, "train.max_steps=8", name="w1", function=with_labelled_net) as job:
        assert job.wait() == [65]
        assert "num_classes: 2 -> 0" in job.output()
    odd_without_even = state["model"]["bias.weight"][1] - state["model"]["bias.weight"][0]
    unlabelled = final_state(train(1, tmp_path, *options, function=with_labelled_net))
    assert unlabelled["model"]["bias.weight"].shape == (1, 1)
    assert odd_without_even.abs() > 0


# A denoiser, a sampler


def knows_the_answer(x_t: Tensor, t: Tensor) -> Denoised:
    """A denoiser that is no network at all: every image is grey 0.5."""
    process = GaussianDiffusion(linear_betas(20))
    x_start = torch.full_like(x_t, 0.5)
    return Denoised(x_start, process.predict_eps_from_start(x_t, t, x_start))


def jump_sample(
    denoiser: Denoise,
    process: GaussianDiffusion,
    x_T: Tensor,
    draw_noise: Callable[[], Tensor],
    options: SamplerOptions,
    on_step: Callable[[], None],
) -> Tensor:
    """Believe the first prediction."""
    x_start = denoiser(x_T, torch.full((len(x_T),), process.num_timesteps - 1)).x_start
    on_step()
    return x_start


JUMP = Sampler(jump_sample, num_calls=lambda options, process: 1, clip=True)


@pytest.mark.parametrize("sampler", [SAMPLERS["ddim"], JUMP])
def test_a_denoiser(sampler: Sampler) -> None:
    process = GaussianDiffusion(linear_betas(20))
    blocks = generate_blocks(
        knows_the_answer, process, sampler, shape=(1, 4, 4), num=3, seed=0, options=SamplerOptions(steps=5),
        device=torch.device("cpu"), on_step=lambda: None, block_size=4,
    )  # fmt: skip
    assert torch.equal(torch.cat(list(blocks)), torch.full((3, 1, 4, 4), 191, dtype=torch.uint8))


def with_jumping_previews(argv: Sequence[str]) -> int:
    SAMPLERS["jump"] = JUMP
    return call_train([*argv, "preview.sampler=jump", "preview.steps=null"])


def test_a_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(1, tmp_path, *RUN, *PICTURES, function=with_jumping_previews)
    assert (run / "samples" / "step-00000006.png").exists()
    assert sample.main([str(run), "--sampler", "jump"]) == 78
    assert "--sampler jump: expected one of ddim, ddpm" in capsys.readouterr().err
    SAMPLERS["jump"] = JUMP
    assert sample.main([str(run), "--sampler", "jump", "--num", "3", "--out", str(tmp_path / "out.npz")]) == 0
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (3, 28, 28, 1)


# An average beside `ema`


def with_short_average(argv: Sequence[str]) -> int:
    usual = build.build_averages
    assembly.build_averages = lambda config, model: {**usual(config, model), "short": EMA(model, 0.1)}  # type: ignore[attr-defined]
    return call_train(argv)


def test_an_average(tmp_path: Path) -> None:
    undisturbed = train(1, tmp_path, *RUN, name="undisturbed", function=with_short_average)
    train(1, tmp_path, *RUN, "train.max_steps=3", name="resumed", function=with_short_average)
    resumed = train(1, tmp_path, *RUN, name="resumed", function=with_short_average)
    state = final_state(resumed)
    assert state["averages"]["short"].keys() == state["ema"].keys()
    assert not torch.equal(state["averages"]["short"]["out_conv.weight"], state["ema"]["out_conv.weight"])
    assert state_differences(undisturbed, resumed) == []
    ours, theirs = (final_state(run)["averages"]["short"] for run in (undisturbed, resumed))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), "it survives a resume, to the bit"


# A periodic task


class CountImages:
    """Writes down, every three steps, how many images were seen."""

    repeats_at_start = False

    def __init__(self, context: TaskContext) -> None:
        self.context = context

    def due(self, step: int) -> bool:
        return step % 3 == 0

    def run(self) -> None:
        seen = self.context.trainer.ranks.gather(self.context.trainer.step * 8)  # a collective: all ranks come here
        self.context.recorder.say(f"images seen: {seen}")


def with_a_count(argv: Sequence[str]) -> int:
    TASKS.append(CountImages)
    return call_train(argv)


def test_a_periodic_task(tmp_path: Path) -> None:
    run = train(2, tmp_path, *RUN, function=with_a_count)
    said = [line for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith("images seen")]
    assert said == ["images seen: [24, 24]", "images seen: [48, 48]"]
    assert state_differences(run, train(2, tmp_path, *RUN, name="plain")) == []


# A trained run, a data set (an old checkpoint: tests/run/test_formats.py)


def test_weights_of_a_trained_run(tmp_path: Path) -> None:
    run = train(1, tmp_path, *RUN)
    loading.WEIGHTS["negative"] = lambda checkpoint: {name: -value for name, value in checkpoint.model.items()}
    plain, negative = (loading.load_run(run, weights=name).network.state_dict() for name in ("model", "negative"))
    assert all(torch.equal(-value, negative[name]) for name, value in plain.items())
    first, *_, last = committed(run)  # a save is left out while the one before it is still being written
    assert (loading.load_run(run, step=first).step, loading.load_run(run).step) == (first, last)


def grey_squares(data: DataConfig, channels: int | None) -> ImagesInMemory:
    return ImagesInMemory(np.full((100, 1, 8, 8), 127, dtype=np.uint8))


def with_grey_squares(argv: Sequence[str]) -> int:
    DATASETS["mnist5k"] = DataSet(grey_squares)
    return call_train(argv)


def test_a_data_set(tmp_path: Path) -> None:
    run = train(1, tmp_path, *RUN, function=with_grey_squares)
    assert final_state(run)["contract"]["image_shape"] == [1, 8, 8]

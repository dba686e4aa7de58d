"""The train command learns what a straight-line reference of one screen says, in every combination that matters.

Weights, averages, moments, loss scale, rates and gradient norms agree to the bit, with two ranks too: the reference
adds in the order of the trainer, and the sum of two ranks is one addition. The logged loss is a sum of other parts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import call_train, differences, final_state, metrics, train
from PIL import Image
from reference_step import train as train_by_reference
from torch import Tensor

Options = dict[str, Any]
STEPS, NUM_IMAGES, SIZE = 20, 60, 8  # an epoch is 7 steps, and 4 images of it are left over


@dataclass(frozen=True)
class Recipe:
    """The options of one comparison, in the words of the reference.

    Attributes:
        micro: micro-batches a rank makes of its part.
        first_scale, growth_interval: of the loss scale in fp16; 2^26 overflows at once, 2 soon grows into overflow.
        nan_step: the step whose gradients are NaN.
    """

    precision: str = "fp32"
    bitwise: bool = False
    ranks: int = 1
    micro: int = 1
    dropout: float = 0.0
    flip: bool = False
    warmup_steps: int = 0
    decay_steps: int | None = None
    grad_clip: float | None = None
    channels_last: bool = True
    fused: bool = True
    first_scale: float = 1.0
    growth_interval: int = 2000
    nan_step: int | None = None
    seed: int = 3
    steps: int = STEPS
    batch_size: int = 8
    shards: int = 4
    channels: int = 8
    schedule: str = "linear"
    zero_terminal_snr: bool = False
    prediction: str = "eps"
    variance: str = "fixed_large"
    weighting: str = "simple"
    min_snr_gamma: float = 5.0
    vlb_weight: float = 0.001
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lr: float = 1e-2
    ema_decay: float = 0.6
    more_decays: tuple[float, ...] = ()
    widths: tuple[float, ...] = ()
    classes: int = 0
    label_dropout: float = 0.1

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def arguments(self) -> list[str]:
        """Of the train command."""
        return [
            f"run.seed={self.seed}",
            f"data.batch_size={self.batch_size}",
            f"data.flip={self.flip}",
            f"model.channels={self.channels}",
            f"model.dropout={self.dropout}",
            f"model.class_labels={bool(self.classes)}",
            f"model.label_dropout={self.label_dropout}",
            f"diffusion.schedule={self.schedule}",
            f"diffusion.zero_terminal_snr={self.zero_terminal_snr}",
            f"diffusion.prediction={self.prediction}",
            f"diffusion.variance={self.variance}",
            f"loss.weighting={self.weighting}",
            f"loss.vlb_weight={self.vlb_weight}",
            f"loss.min_snr_gamma={self.min_snr_gamma}",
            f"optim.name={self.optimizer}",
            f"optim.beta1={self.betas[0]}",
            f"optim.beta2={self.betas[1]}",
            f"optim.eps={self.eps}",
            f"optim.weight_decay={self.weight_decay}",
            f"optim.lr={self.lr}",
            f"optim.schedule={'cosine' if self.decay_steps else 'constant'}",
            f"optim.warmup_steps={self.warmup_steps}",
            f"optim.decay_steps={self.decay_steps or 'null'}",
            f"optim.grad_clip={self.grad_clip or 'null'}",
            f"optim.fused={self.fused}",
            f"ema.decay={self.ema_decay}",
            f"ema.more={list(self.more_decays)}",
            *([f"ema.widths={list(self.widths)}", "checkpoint.ema_snapshots=7"] if self.widths else []),
            f"train.max_steps={self.steps}",
            f"train.precision={self.precision}",
            f"train.channels_last={str(self.channels_last).lower()}",
            f"train.micro_batch_size={self.batch_size // self.ranks // self.micro if self.micro > 1 else 'null'}",
            f"elastic.mode={'bitwise' if self.bitwise else 'stream'}",
            f"elastic.shards={self.shards}",
        ]


# Every value of every option, and the pairs that meet in one line of the step: clipping and the loss scale, dropout
# and micro-batches, a skipped update and everything that counts updates.
COSINE: Options = {"warmup_steps": 4, "decay_steps": 16}  # ends before the run does
RANDOM: Options = {"dropout": 0.2, "flip": True}
ADAMW: Options = {"optimizer": "adamw", "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
RECIPES: dict[str, Recipe] = {
    "the defaults": Recipe(),
    "fp32, micro-batches, cosine, clipped": Recipe(micro=4, grad_clip=0.5, **RANDOM, **COSINE),
    "fp32, several averages, NaN": Recipe(more_decays=(0.8, 0.3), widths=(0.05, 0.1), nan_step=5, **COSINE),
    "fp32, v prediction": Recipe(prediction="v", **RANDOM, **COSINE),
    "fp32, x0 prediction, min-SNR, sigmoid": Recipe(
        prediction="x0", weighting="min_snr", min_snr_gamma=2.5, schedule="sigmoid", micro=2, **RANDOM, **COSINE
    ),
    "fp32, min-SNR, cosine, AdamW": Recipe(weighting="min_snr", schedule="cosine", **ADAMW),
    "fp32, v prediction, p2, zero terminal SNR, AdamW, NaN": Recipe(
        prediction="v", weighting="p2", zero_terminal_snr=True, nan_step=5, grad_clip=0.05, **ADAMW, **COSINE
    ),
    "fp16, v prediction, min-SNR, scaled linear, bitwise, no fused AdamW": Recipe(
        "fp16",
        bitwise=True,
        prediction="v",
        weighting="min_snr",
        schedule="scaled_linear",
        zero_terminal_snr=True,
        fused=False,
        growth_interval=4,
        first_scale=2.0**22,
        **ADAMW,
    ),
    "fp32, learned variance, micro-batches, clipped": Recipe(
        variance="learned", micro=2, grad_clip=0.5, **RANDOM, **COSINE
    ),
    "fp32, v prediction, learned variance, bound, cosine": Recipe(
        prediction="v", variance="learned", weighting="vlb", schedule="cosine", grad_clip=0.5
    ),
    "fp32, bound of fixed small": Recipe(weighting="vlb", variance="fixed_small", grad_clip=0.5, flip=True),
    "2 ranks, bf16, bitwise, x0 prediction, min-SNR, learned variance": Recipe(
        "bf16", bitwise=True, ranks=2, prediction="x0", weighting="min_snr", variance="learned", vlb_weight=0.01
    ),
    "2 ranks, p2, AdamW": Recipe(ranks=2, weighting="p2", **ADAMW, **COSINE),
    "fp32, no fused Adam, NaN": Recipe(fused=False, nan_step=5, warmup_steps=6, channels_last=False, **RANDOM),
    "fp32, bitwise, NaN": Recipe(bitwise=True, nan_step=7, grad_clip=0.5, **RANDOM, **COSINE),
    "bf16, micro-batches": Recipe("bf16", micro=2, channels_last=False, grad_clip=0.5, **RANDOM),
    "bf16, bitwise": Recipe("bf16", bitwise=True, decay_steps=20, **RANDOM),
    "fp16, clipped": Recipe("fp16", first_scale=2.0**22, grad_clip=0.5, channels_last=False, **RANDOM, **COSINE),
    "fp16, growing scale, no fused Adam": Recipe("fp16", fused=False, micro=2, first_scale=2.0**22, growth_interval=3),
    "fp16, bitwise, NaN": Recipe("fp16", bitwise=True, nan_step=9, grad_clip=0.5, growth_interval=4, **RANDOM),
    "fp32, labels": Recipe(classes=3, micro=2, **RANDOM),
    "2 ranks, labels, few of them hidden": Recipe(ranks=2, classes=3, label_dropout=0.05, **RANDOM),
    "2 ranks, bitwise, labels, NaN": Recipe(
        bitwise=True, ranks=2, classes=3, label_dropout=0.5, nan_step=3, grad_clip=0.5, **RANDOM, **COSINE
    ),
    "2 ranks": Recipe(ranks=2, nan_step=3, **RANDOM, **COSINE),
    "2 ranks, micro-batches, clipped": Recipe(ranks=2, micro=2, grad_clip=0.5, channels_last=False, **RANDOM),
    "2 ranks, bf16, bitwise": Recipe("bf16", bitwise=True, ranks=2, grad_clip=0.5, **RANDOM),
    "2 ranks, fp16": Recipe("fp16", ranks=2, first_scale=2.0**23, growth_interval=3, grad_clip=0.5, **RANDOM),
}

QUICK = (
    "2 ranks, labels, few of them hidden",
    "the defaults",
    "fp32, micro-batches, cosine, clipped",
    "fp32, several averages, NaN",
    "fp32, v prediction",
    "fp32, x0 prediction, min-SNR, sigmoid",
    "fp32, v prediction, p2, zero terminal SNR, AdamW, NaN",
    "fp32, learned variance, micro-batches, clipped",
    "fp32, v prediction, learned variance, bound, cosine",
    "fp16, clipped",
    "2 ranks, bf16, bitwise",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small coloured pictures of three classes, so that an epoch ends within the run."""
    path = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = path / "abc"[(number > 10) + (number > 40)]  # a sub-folder for each class
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number:03}.png")
    return path


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, SIZE, SIZE] and the labels, int64 [N]."""
    paths = sorted(folder.glob("*/*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(["abc".index(path.parent.name) for path in paths])


def call_train_with(recipe: Recipe, argv: Sequence[str]) -> int:
    """The real command, with a loss scale of the recipe's and NaN in one backward pass on the last rank."""
    scale = {"init_scale": recipe.first_scale, "growth_interval": recipe.growth_interval}
    torch.amp.GradScaler.__init__ = functools.partialmethod(torch.amp.GradScaler.__init__, **scale)  # type: ignore
    passes_a_step = recipe.shards // recipe.ranks if recipe.bitwise else recipe.micro
    is_last = int(os.environ.get("RANK", "0")) == recipe.ranks - 1
    backward: Any = torch.Tensor.backward
    passes = 0

    def spoiled(loss: Tensor, *args: Any, **options: Any) -> None:
        nonlocal passes
        is_due = recipe.nan_step is not None and is_last and passes == recipe.nan_step * passes_a_step
        passes += 1
        backward(loss * torch.nan if is_due else loss, *args, **options)

    torch.Tensor.backward = spoiled  # type: ignore
    return call_train(argv)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_train_command_learns_what_the_reference_does(tmp_path: Path, folder: Path, name: str) -> None:
    recipe = RECIPES[name]
    images = ("data.name=folder", f"data.root={folder}", f"data.image_size={SIZE}", "data.num_workers=0")
    rigged = functools.partial(call_train_with, recipe)
    run = train(recipe.ranks, tmp_path, *images, *recipe.arguments, function=rigged)
    state, log = final_state(run), metrics(run)
    torch.set_num_threads(1)  # as the trainer; another test of this process may have asked for more
    model, averages, adam, scale, expected = train_by_reference(*read_images(folder), recipe)

    names = [name for name, _ in model.named_parameters()]
    learned = {name: dict(state[name]) for name in ("model", "ema")} | {"adam": state["optimizer"]["state"]}
    kept = {name: dict(zip(names, average, strict=True)) for name, average in averages.items()}
    wanted = {"model": dict(model.state_dict()), "ema": kept.pop("ema")}
    assert kept.keys() == state.get("averages", {}).keys()
    assert differences({name: dict(average) for name, average in state.get("averages", {}).items()}, kept) == []
    assert differences(learned, wanted | {"adam": adam.state_dict()["state"]}) == []
    assert state["step"] == len(log) == STEPS
    assert state["scaler"].get("scale", recipe.first_scale) == scale
    for record, line in zip(log, expected, strict=True):
        applied = not line["skipped"]
        assert (record["lr"], record["skipped"]) == (line["lr"], line["skipped"])
        assert record["loss"] == (pytest.approx(line["loss"], rel=1e-6) if applied else None)
        assert record["grad_norm"] == (line["grad_norm"] if applied else None)

    # Else the comparison would show nothing about skips and clipping.
    can_skip = recipe.nan_step is not None or recipe.precision == "fp16"
    assert any(line["skipped"] for line in expected) == can_skip
    assert any(line["grad_norm"] > (recipe.grad_clip or 0.0) for line in expected)

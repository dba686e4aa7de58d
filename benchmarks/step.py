"""Our training step against a bare loop, in fp32 and bf16, with and without channels_last.

    python -m benchmarks.step [--channels 32] [--batch 64] [--rounds 10] [--threads N]

Each round runs a few steps of every variant in turn, so that a machine that becomes slower or faster affects all alike.
The ratios are medians over the rounds, with their minimum and maximum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ddpm_dist.config import load_config
from ddpm_dist.data.batches import Batch
from ddpm_dist.models.unet import UNet
from ddpm_dist.parallel.environment import cpu_threads, read_environment
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.training.assembly import build_trainer
from ddpm_dist.training.precision import resolve

STEPS_PER_ROUND = 3


def synthetic_batch(size: int) -> Batch:
    """A batch of random images of MNIST's shape."""
    return Batch(
        torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8),
        torch.randint(0, 1000, (size,)),
        torch.randn(size, 1, 28, 28),
        {},
    )


def trainer_step(channels: int, batch: Batch, *overrides: str) -> Callable[[], None]:
    """One call is one step of the real Trainer: q_sample, EMA and metrics included."""
    config = load_config(None, [f"model.channels={channels}", f"data.batch_size={len(batch.t)}", *overrides])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ranks = Ranks(read_environment({}), device, 60.0, lambda: False)
    numerics = resolve(config.train, device)
    trainer = build_trainer(config, ranks, numerics, image_shape=(1, 28, 28))
    number = trainer.reduction.num_micro_batches
    return lambda: trainer.train_step(trainer.placement.micro_batches(batch, number))


def bare_step(channels: int, batch: Batch) -> Callable[[], None]:
    """One call is forward, backward and Adam in fp32, on inputs that are ready, and nothing else."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = UNet(channels=channels).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)
    t, noise = batch.t.to(device), batch.noise.to(device)

    def step() -> None:
        torch.nn.functional.mse_loss(model(noise, t), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Read the command line, measure, and print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=cpu_threads(read_environment({})))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch = synthetic_batch(args.batch)
    fp32, bf16, nchw, nhwc = (
        "train.precision=fp32",
        "train.precision=bf16",
        "train.channels_last=false",
        "train.channels_last=true",
    )
    variants = {
        "bare loop, fp32": bare_step(args.channels, batch),
        "train_step, fp32": trainer_step(args.channels, batch, fp32, nchw),
        "train_step, fp32, channels_last": trainer_step(args.channels, batch, fp32, nhwc),
        "train_step, bf16": trainer_step(args.channels, batch, bf16, nchw),
        "train_step, bf16, channels_last": trainer_step(args.channels, batch, bf16, nhwc),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(args.rounds + 1):  # the first warms up
        for name, step in variants.items():
            begin = time.perf_counter()
            for _ in range(STEPS_PER_ROUND):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number:
                seconds[name].append((time.perf_counter() - begin) / STEPS_PER_ROUND)

    print(f"{args.channels} channels, batch {args.batch}, {torch.get_num_threads()} thread(s), {args.rounds} rounds")
    floor = seconds["bare loop, fp32"]
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(floor, times, strict=True)]
        print(
            f"{name:34s} {args.batch / statistics.median(times):7.0f} images/s   "
            f"{statistics.median(ratios):5.2f} x bare ({min(ratios):.2f} .. {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()

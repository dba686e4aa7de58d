"""What it costs that any number of ranks computes the same bits: bitwise mode against stream mode.

    python -m benchmarks.elastic [--worlds 2,4] [--channels 32] [--batch 64] [--shards 8] [--rounds 40]

Both modes have the same micro-batches. All ranks hold both trainers and run a step of each in turn, so that a machine
that becomes slower or faster affects both alike. A ratio is the median over the rounds, with a 95 % bootstrap
interval. CPU time is that of all ranks together.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ddpm_dist.config import load_config
from ddpm_dist.data.batches import Batch
from ddpm_dist.parallel.environment import read_environment
from ddpm_dist.parallel.local import LocalRanks
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.training.assembly import build_trainer
from ddpm_dist.training.precision import resolve
from ddpm_dist.training.step import Trainer

MODES = ("stream", "bitwise")


def measure(argv: Sequence[str]) -> int:
    """Measure on one rank. Rank 0 writes {mode: [[wall seconds, CPU seconds of all ranks], ...]} as JSON.

    Args:
        argv: channels, batch size, shards, rounds, and the file to write.

    Returns:
        exit code 0.
    """
    channels, batch, shards, rounds = (int(word) for word in argv[:4])
    torch.set_num_threads(1)
    env = read_environment()
    ranks = Ranks(env, torch.device("cpu"), 120.0, lambda: False)
    trainers = {mode: _trainer(ranks, mode, channels, batch, shards) for mode in MODES}
    per_rank = batch // env.world_size
    part = Batch(
        torch.randint(0, 256, (per_rank, 1, 28, 28), dtype=torch.uint8),
        torch.randint(0, 1000, (per_rank,)),
        torch.randn(per_rank, 1, 28, 28),
        {},
    )
    taken: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for round_number in range(-3, rounds):  # the first three warm up
        for mode in MODES if round_number % 2 else reversed(MODES):
            ranks.sum(torch.zeros(1))  # all ranks start the step together
            wall, cpu = time.perf_counter(), time.process_time()
            trainer = trainers[mode]
            trainer.train_step(trainer.placement.micro_batches(part, trainer.reduction.num_micro_batches))
            used = ranks.sum(torch.tensor([time.process_time() - cpu], dtype=torch.float64))
            if round_number >= 0:
                taken[mode].append([time.perf_counter() - wall, float(used)])
    if ranks.is_zero:
        Path(argv[4]).write_text(json.dumps(taken))
    ranks.leave()
    return 0


def _trainer(ranks: Ranks, mode: str, channels: int, batch: int, shards: int) -> Trainer:
    micro = [] if mode == "bitwise" else [f"train.micro_batch_size={batch // shards}"]
    sizes = [f"model.channels={channels}", f"data.batch_size={batch}", f"elastic.shards={shards}"]
    config = load_config(None, [f"elastic.mode={mode}", "train.precision=fp32", *sizes, *micro])
    return build_trainer(config, ranks, resolve(config.train, ranks.device), image_shape=(1, 28, 28))


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower, upper): the median of the ratios, and its 95 % interval by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[-50]


def main() -> None:
    """Read the command line, measure on each number of ranks, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="2,4")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    print(f"{args.channels} channels, batch {args.batch} in {args.shards} shards, fp32, gloo, {args.rounds} rounds")
    for world_size in map(int, args.worlds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            log, result = Path(folder) / "log", Path(folder) / "result.json"
            argv = [*map(str, (args.channels, args.batch, args.shards, args.rounds)), str(result)]
            with LocalRanks(world_size, log, measure, (argv,)) as ranks:
                if any(ranks.exit_codes(3600)):
                    sys.exit(ranks.output())
            taken = json.loads(result.read_text())
        for place, name in enumerate(("wall time", "CPU time")):
            pairs = zip(taken["bitwise"], taken["stream"], strict=True)
            median, lower, upper = interval([bitwise[place] / stream[place] for bitwise, stream in pairs])
            own = statistics.median(step[place] for step in taken["stream"])
            print(
                f"{world_size} ranks, {name}: stream {1000 * own:7.1f} ms a step, bitwise "
                f"{median:.3f} x stream (95 %: {lower:.3f} .. {upper:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()

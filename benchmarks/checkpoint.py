"""What a save costs: how long the loop waits, against a plain copy of the state; and our write against torch.save.

    python -m benchmarks.checkpoint [--megabytes 50 500] [--rounds 9] [--directory DIR]

Each round measures every variant once. The figures are medians over the rounds, the ratios are those of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ddpm_dist.config import CheckpointConfig
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.saver import Saver
from ddpm_dist.run.store import CheckpointStore


def state_of(megabytes: int, step: int) -> Checkpoint:
    """A checkpoint of this size: weights, average and Adam's two moments, a quarter each, in tensors of 1 MB."""
    count = megabytes // 4

    def part() -> dict[str, torch.Tensor]:
        return {f"layer{index}.weight": torch.randn(250_000) for index in range(count)}

    moments = {index: {"exp_avg": torch.randn(250_000), "exp_avg_sq": torch.rand(250_000)} for index in range(count)}
    optimizer = {"state": moments, "param_groups": [{"lr": 2e-4}]}
    return Checkpoint(step, part(), part(), optimizer, {}, torch.zeros(6), {}, {})


def copy(checkpoint: Checkpoint, into: list[torch.Tensor]) -> None:
    """Copy the tensors of the checkpoint into these, which have the same shapes."""
    moments = [tensor for entry in checkpoint.optimizer["state"].values() for tensor in entry.values()]
    for target, source in zip(into, [*checkpoint.model.values(), *checkpoint.ema.values(), *moments], strict=True):
        target.copy_(source)


def seconds(function: Callable[[], object]) -> float:
    """How long a call of the function takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def measure(megabytes: int, rounds: int, directory: Path) -> None:
    """Measure with a state of this size, writing into the directory, and print the figures."""
    checkpoint = state_of(megabytes, 1)
    store = CheckpointStore(directory / "store")
    saver = Saver(store, CheckpointConfig(), lambda: None, lambda step: None, print)
    buffers = [torch.empty(250_000) for _ in range(megabytes // 4 * 4)]
    plain, times = vars(checkpoint), dict[str, list[float]]()

    def bare() -> None:
        torch.save(plain, directory / "bare.pt")

    def submit_and_settle() -> None:
        times.setdefault("stall of the loop", []).append(seconds(lambda: saver.submit(checkpoint, {})))
        saver.finish()

    for number in range(rounds + 1):
        times.setdefault("plain copy in memory", []).append(seconds(lambda: copy(checkpoint, buffers)))
        submit_and_settle()
        times.setdefault("bare torch.save", []).append(seconds(bare))
        times.setdefault("ours: sha256, fsync, commit", []).append(seconds(lambda: store.save(checkpoint, {})))
        if number == 0:  # the first round does not count: it makes the buffers
            times.clear()
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"state of {megabytes} MB, {rounds} rounds")
    for pair in (("stall of the loop", "plain copy in memory"), ("ours: sha256, fsync, commit", "bare torch.save")):
        ours, reference = (medians[name] for name in pair)
        words = f"{pair[0]:<28}{ours * 1e3:9.1f} ms   {pair[1]:<21}{reference * 1e3:9.1f} ms"
        print(f"{words}   ratio {ours / reference:.2f}")


def main() -> None:
    """Read the command line, and measure with each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, help="where to write [a temporary folder]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            measure(megabytes, args.rounds, Path(folder))


if __name__ == "__main__":
    main()

"""What tracking costs: a step without it and a step with an MLflow server that hangs, in turn; and writing one line.

python -m benchmarks.tracking [--rounds 5] [--steps 400]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpm_dist.tracking.journal import Journal

RUN = (
    *("data.name=mnist5k", "data.batch_size=16", "model.channels=16", "train.device=cpu", "train.threads=1"),
    *("train.log_every=1", "preview.num_images=0", "checkpoint.every=1000000"),
)


def train(root: Path, name: str, steps: int, *overrides: str) -> tuple[float, float]:
    """Train a run. Returns (median milliseconds of a step, CPU seconds of the trainer without its shipper)."""
    argv = [sys.executable, "-m", "ddpm_dist.train", *RUN, f"run.root={root}", f"run.name={name}"]
    process = subprocess.Popen([*argv, f"train.max_steps={steps}", *overrides], stdout=subprocess.DEVNULL)
    metrics = root / name / "metrics.jsonl"
    cpu = 0.0
    while process.poll() is None:
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if lines >= steps:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            process.kill()  # a finished run waits for its shipper, which is not to be measured
        time.sleep(0.02)
    times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
    return statistics.median(b - a for a, b in itertools.pairwise(times[20:])) * 1e3, cpu


def line_milliseconds(root: Path) -> float:
    """Median milliseconds that writing a line of metrics.jsonl takes."""
    journal, times = Journal(root / "lines.jsonl"), []
    for step in range(10_000):
        record = {"step": step, "epoch": 0.1, "attempt": 1, "time": time.time(), "loss": 0.1, "lr": 2e-4}
        begun = time.perf_counter()
        journal.append(record | {"grad_norm": 0.2, "skipped": 0, "images_per_second": 100.0})
        times.append(time.perf_counter() - begun)
    journal.close()
    return statistics.median(times) * 1e3


def main() -> None:
    """Read the command line, train the runs in turn, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    without: list[tuple[float, float]] = []
    hung: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as silent:
        root = Path(folder)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"  # takes connections and never answers
        for number in range(args.rounds):
            without.append(train(root, f"without-{number}", args.steps, "tracking.enabled=no"))
            hung.append(train(root, f"hung-{number}", args.steps, f"tracking.uri={uri}"))
        print(f"a line of metrics.jsonl: {line_milliseconds(root):.4f} ms (median of 10,000)")
    for name, index, unit in (("step", 0, "ms"), ("CPU time of the trainer", 1, "s")):
        ratios = sorted(b[index] / a[index] for a, b in zip(without, hung, strict=True))
        medians = [statistics.median(each[index] for each in kind) for kind in (without, hung)]
        print(
            f"{name}: {medians[0]:.2f} {unit} without tracking, {medians[1]:.2f} {unit} with a server that hangs; "
            f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()

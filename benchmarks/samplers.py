"""How good the images of few steps are, and how long they take, against ancestral sampling over all timesteps.

    python -m benchmarks.samplers runs/quickstart [--num 2000] [--seeds 0,1] [--out FOLDER]

The run draws digits, like the quick start. All samplers draw from the same weights, one after the other, by the
command `sample` on one core; ancestral sampling of 2,000 images of 16 x 16 takes half an hour. A file that is in FOLDER
already is not drawn again, and has no time. The Fréchet distance (Heusel et al. 2017, arXiv:1706.08500) to the 5,000
real digits of mnist5k is that of 128 features of a small network, which learns here to tell digits apart. The floor is
the distance between two halves of the real images. Such a distance means nothing beside one with other features.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from judge import Judge

from ddpm_dist.data.in_memory import ImagesInMemory, read_mnist5k
from ddpm_dist.loading import load_run

SAMPLERS = {
    "ddpm, all timesteps": ["--sampler", "ddpm"],
    "ddim, 50 steps": ["--sampler", "ddim", "--steps", "50"],
    "dpm++, 20 steps": ["--sampler", "dpm++", "--steps", "20"],
}
BASE = "ddpm, all timesteps"


def drawn(run: Path, out: Path, flags: list[str]) -> float | None:
    """Draw the images into `out`. Returns seconds of processor time; None if they were there already."""
    if out.exists():
        return None
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    argv = [sys.executable, "-m", "ddpm_dist.sample", str(run), "--out", str(out), "--device", "cpu", *flags]
    subprocess.run(argv, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two sets of features, each float64 [N, D]."""
    difference = one.mean(0) - other.mean(0)
    first, second = torch.cov(one.T), torch.cov(other.T)
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return float(difference @ difference + first.trace() + second.trace() - 2 * root)


def main() -> None:
    """Read the command line, draw, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("samplers"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    real = ImagesInMemory(read_mnist5k(), size=load_run(args.run).image_shape[1]).fetch(range(5000))
    judge = Judge(real, torch.arange(10).repeat_interleave(500), epochs=5)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    halves = [judge.features(real[part]) for part in order[: 2 * args.num].chunk(2)]
    print(f"{'real, half against half':24} {frechet_distance(*halves):8.2f}", flush=True)

    all_real, base_distance, base_seconds = judge.features(real), 0.0, None
    for name, flags in SAMPLERS.items():
        distances, seconds = [], []
        for seed in args.seeds.split(","):
            out = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.npz"
            taken = drawn(args.run, out, [*flags, "--num", str(args.num), "--seed", seed])
            seconds += [] if taken is None else [taken]
            images = torch.from_numpy(np.load(out)["arr_0"]).permute(0, 3, 1, 2)
            distances.append(frechet_distance(judge.features(images), all_real))
        mean, took = statistics.mean(distances), statistics.mean(seconds) if seconds else None
        if name == BASE:
            base_distance, base_seconds = mean, took
        spread = f"{min(distances):.2f} to {max(distances):.2f}"
        ratio = f"{mean / base_distance:5.2f} x"
        time = "" if took is None or base_seconds is None else f"{took:8.1f} s  1/{base_seconds / took:.0f}"
        print(f"{name:24} {mean:8.2f} ({spread})  {ratio} {time}", flush=True)


if __name__ == "__main__":
    main()

"""Every preset, in small: trained, killed, resumed and moved to other ranks; and one update at full width.

    python tests/presets.py                  # all files of configs/, through the real command; some minutes
    python tests/presets.py cifar10-ho2020   # one

It prints one line for each preset. tests/test_presets.py does a part of it at each run of the tests.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import committed, metrics, state_differences
from PIL import Image

from ddpm_dist.config import Config, load_config

ROOT = Path(__file__).parents[1]
GOOGLE_DDPM_CIFAR10_32 = {
    # https://huggingface.co/google/ddpm-cifar10-32/blob/main/unet/config.json: the weights of Ho et al.'s own code
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
COLOUR = ("cifar10", "folder")  # data sets that are replaced by noise of their size and number of channels


def make_pictures(folder: Path, size: int = 64, num: int = 24) -> Path:
    """A folder of noise: RGB pictures in two sub-folders, which are their classes."""
    for number in range(num):
        picture = Image.frombytes("RGB", (size, size), random.Random(number).randbytes(3 * size * size))
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "ab"[number % 2] / f"{number}.png")
    return folder


def on_this_machine(preset: Path, pictures: Path, batch_size: int = 8) -> list[str]:
    """Overrides that leave the recipe as it is, and take images that are at hand: real digits, or noise in colour."""
    config = load_config(preset)
    data = [f"data.batch_size={batch_size}", "elastic.shards=2", "elastic.mode=bitwise", "data.name=mnist5k"]
    if config.data.name in COLOUR:
        data += ["data.name=folder", f"data.root={pictures}", "data.num_workers=0", "data.channels=3"]
        data += [f"data.image_size={config.data.image_size or 32}"]
    shown = ["preview.num_images=0", "tracking.enabled=false", "train.log_every=1"]
    cosine = ["optim.warmup_steps=2", "optim.decay_steps=1000"] if config.optim.schedule == "cosine" else []
    return [*data, *shown, *cosine, "train.device=cpu", "train.threads=1", "train.precision=fp32"]


def narrow(config: Config) -> list[str]:
    """Overrides that cut the widths of the network, and leave its depth and its kinds of blocks."""
    if config.model.name != "unet2d":
        return ["model.channels=8"]
    widths = [4 * width // min(config.unet2d.block_out_channels) for width in config.unet2d.block_out_channels]
    cut = {"block_out_channels": widths, "norm_num_groups": 2}
    heads = {"attention_head_dim": 2, "attn_norm_num_groups": 2}
    cut |= {name: value for name, value in heads.items() if getattr(config.unet2d, name) is not None}
    return [f"unet2d.{name}={value}" for name, value in cut.items()]


def train(preset: Path, root: Path, name: str, *overrides: str, ranks: int = 1, kill_at: int | None = None) -> Path:
    """The real command. With `kill_at`, all ranks are killed once that step is logged. Returns the run directory."""
    command = [sys.executable, "-m", "ddpm_dist.train"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "ddpm_dist.train"]
    command += ["--config", str(preset), *overrides, f"run.root={root}", f"run.name={name}"]
    with (root / f"{name}.log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None:
            time.sleep(0.05)
            if kill_at is not None and any(line["step"] >= kill_at for line in metrics(root / name)):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return root / name
    if process.returncode != 0 or kill_at is not None:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{(root / f'{name}.log').read_text()}")
    return root / name


def kill_resume_and_move(preset: Path, root: Path) -> str:
    """20 steps at batch 8; killed at a random step and resumed; killed there and moved to two ranks."""
    given = [*on_this_machine(preset, root / "pictures"), *narrow(load_config(preset)), "checkpoint.every=3"]
    given = [*given, "train.max_steps=20"]
    whole = train(preset, root, "whole", *given)
    kill_at, problems = random.randrange(4, 18), []
    for name, ranks in (("resumed", 1), ("moved", 2)):
        train(preset, root, name, *given, kill_at=kill_at)
        step = committed(root / name)[-1]
        if different := state_differences(whole, train(preset, root, name, *given, ranks=ranks)):
            problems.append(f"{name} from step {step}: {', '.join(different[:3])} differ")
    said = "; ".join(problems) or "resumed and moved to 2 ranks to the bit"
    return f"20 steps at batch 8, killed after step {kill_at}: {said}"


def one_update(preset: Path, root: Path) -> str:
    """One update at full width at batch 2. Two shards, so that it is the update of bitwise mode."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    begun = time.monotonic()
    train(preset, root, "full", *on_this_machine(preset, root / "pictures", batch_size=2), "train.max_steps=1")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    memory = f"{peak / 2**20:.1f} GiB" if peak > before else f"at most {before / 2**20:.1f} GiB"
    return f"one update at full width at batch 2: {time.monotonic() - begun:.0f} s in all, {memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets, without .yaml [all]")
    args = parser.parse_args()
    for preset in PRESETS:
        if not args.names or preset.stem in args.names:
            with tempfile.TemporaryDirectory() as folder:
                make_pictures(Path(folder) / "pictures")
                print(f"{preset.stem}: {kill_resume_and_move(preset, Path(folder))}", flush=True)
                print(f"{preset.stem}: {one_update(preset, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()

"""Draw images from the averaged weights of a run: a grid, a folder of PNGs, or one .npz file.

    python -m ddpm_dist.sample runs/mnist
    python -m ddpm_dist.sample runs/mnist --num 10000 --sampler ddpm --out images.npz

The same seed gives the same images, whatever the number asked for.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_dist.command import CommandLine, exit_codes, refuse
from ddpm_dist.errors import ConfigError, UserError
from ddpm_dist.run.directory import RunDirectory, is_weights_file, no_run

if TYPE_CHECKING:
    from torch import Tensor


EPILOG = exit_codes((65, 70, 78, 130), {0: "the images are drawn"})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises ConfigError."""
    parser = CommandLine(prog="python -m ddpm_dist.sample", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "run_directory",
        type=Path,
        metavar="RUN_DIR",
        help="directory of the run, like runs/mnist; or exported weights, FILE.safetensors",
    )
    parser.add_argument("--num", type=int, default=64, metavar="N", help="number of images [64]")
    parser.add_argument(
        "--sampler", default="ddim", metavar="NAME", help="ddim, or ddpm, which visits all timesteps [ddim]"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="timesteps that ddim visits [50]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the images [0]")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint [the newest valid one]")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto is cuda if there is one [auto]"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="grid.png, a folder/ (00000.png ...), or images.npz (arr_0: uint8 [N, H, W, C]) "
        "[RUN_DIR/samples/SAMPLER-seedS-step-N.png]",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and print where the images are. Returns the exit code."""
    try:
        args = parse(argv)
        _check(args)
        out = _sample(args)
    except (UserError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped before all images were drawn", file=sys.stderr)
        return 130
    print(out)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.num < 1:
        raise ConfigError(f"--num {args.num}: expected at least 1")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: expected at least 0")
    if args.out and not args.out.endswith("/") and Path(args.out).suffix not in ("", ".png", ".npz"):
        raise ConfigError(f"--out {args.out}: expected grid.png, images.npz or a folder/")
    if not is_weights_file(args.run_directory) and not RunDirectory(args.run_directory).config_file.exists():
        raise no_run(args.run_directory)


def _sample(args: argparse.Namespace) -> Path:
    import torch
    from tqdm import tqdm

    from ddpm_dist.diffusion.samplers import SAMPLERS, SamplerOptions
    from ddpm_dist.evaluation.generate import generate_blocks, num_model_calls
    from ddpm_dist.loading import load_run
    from ddpm_dist.parallel.environment import cpu_threads, read_environment
    from ddpm_dist.training.precision import configure_backends

    if args.sampler not in SAMPLERS:
        raise ConfigError(f"--sampler {args.sampler}: expected one of {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[args.sampler]
    if args.steps is not None and "steps" not in sampler.takes:
        raise ConfigError(
            f"--steps {args.steps}: --sampler {args.sampler} visits all timesteps; leave --steps out, or give "
            "--sampler ddim"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no CUDA device; valid here: auto, cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    run = load_run(args.run_directory, args.step, device=device)
    configure_backends(run.config.train, cpu_threads(read_environment()))
    num_timesteps = run.process.num_timesteps
    if args.steps is not None and not 1 <= args.steps <= num_timesteps:
        raise ConfigError(
            f"--steps {args.steps}: expected 1 to {num_timesteps}, since the run has "
            f"diffusion.num_timesteps={num_timesteps}"
        )

    out = Path(args.out or run.directory.samples / f"{args.sampler}-seed{args.seed}-step-{run.step:08d}.png")
    options = SamplerOptions(steps=args.steps)
    total = num_model_calls(args.num, sampler, options, num_timesteps)
    with tqdm(total=total, unit="call", desc=f"{args.num} images", disable=None) as bar:
        blocks = generate_blocks(
            run.denoiser(sampler.clip),
            run.process,
            sampler,
            shape=run.image_shape,
            num=args.num,
            seed=args.seed,
            options=options,
            device=device,
            on_step=lambda: bar.update() and None,
        )
        try:
            as_folder = out.suffix == "" or str(args.out).endswith("/")
            _probe(out, as_folder, args.num)
            height, width = run.image_shape[1:]
            print(f"drawing {args.num} images of {height} x {width} from step {run.step}", file=sys.stderr, flush=True)
            _write(blocks, out, as_folder)
        except OSError as error:
            reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
            raise ConfigError(f"--out {out}: cannot be written ({error.filename or out}: {reason})") from None
    return out


def _probe(out: Path, as_folder: bool, num: int) -> None:
    """Find out whether the images can be written to `out`, before hours of sampling.

    Raises:
        OSError: they cannot.
        ConfigError: `out` is a folder where a file is asked for, or holds more images than are asked for.
    """
    if not as_folder and out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; give {out}/ to fill it, or the name of a file")
    folder = out if as_folder else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    if as_folder and any(path.stem.isdigit() and int(path.stem) >= num for path in folder.glob("*.png")):
        raise ConfigError(
            f"--out {out}: holds more images than --num {num} already, and all are left as they are; give an empty "
            "folder"
        )
    with tempfile.TemporaryFile(dir=folder):
        pass


def _write(blocks: Iterator[Tensor], out: Path, as_folder: bool) -> None:
    """Write blocks of uint8 [B, C, H, W] to one .npz or .png, or to a folder of PNGs that are named by their index."""
    import numpy as np
    import torch

    from ddpm_dist.evaluation.pictures import save_grid, save_png
    from ddpm_dist.run.files import replacing

    if as_folder:
        index = 0
        for block in blocks:
            for image in block:
                save_png(image, out / f"{index:05d}.png")
                index += 1
        return
    if out.suffix == ".png":
        save_grid(torch.cat(list(blocks)), out)
        return
    pixels = torch.cat(list(blocks)).permute(0, 2, 3, 1).contiguous().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=pixels)
    with replacing(out) as file:
        file.write(buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())

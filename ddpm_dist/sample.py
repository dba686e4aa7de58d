"""Draw images from the averaged weights of a run: a grid, a folder of PNGs, or one .npz file.

    python -m ddpm_dist.sample runs/mnist
    python -m ddpm_dist.sample runs/mnist --num 10000 --sampler ddpm --out images.npz

The same seed gives the same images, whatever the number asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_dist.command import CommandLine, exit_codes, refuse
from ddpm_dist.errors import ConfigError, UserError
from ddpm_dist.evaluation.drawing import Request, draw
from ddpm_dist.evaluation.image_files import Target
from ddpm_dist.evaluation.sampler_flags import add_sampler_flags, sampler_choice
from ddpm_dist.run.directory import RunDirectory, is_weights_file, no_run

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
    add_sampler_flags(parser)
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
        out = draw(request_of(parse(argv)))
    except (UserError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped before all images were drawn", file=sys.stderr)
        return 130
    print(out)
    return 0


def request_of(args: argparse.Namespace) -> Request:
    """What the command line asks for. Raises UserError for what cannot be right in any run."""
    if args.num < 1:
        raise ConfigError(f"--num {args.num}: expected at least 1")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: expected at least 0")
    target = Target.named(args.out) if args.out else None
    if not is_weights_file(args.run_directory) and not RunDirectory(args.run_directory).config_file.exists():
        raise no_run(args.run_directory)
    return Request(
        run=args.run_directory,
        num=args.num,
        seed=args.seed,
        sampler=sampler_choice(args),
        step=args.step,
        device=args.device,
        target=target,
    )


if __name__ == "__main__":
    sys.exit(main())

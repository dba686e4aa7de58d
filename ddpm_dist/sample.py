"""Draw images from the averaged weights of a run: a grid, a folder of PNGs, or one .npz file.

    python -m ddpm_dist.sample runs/mnist
    torchrun --nproc_per_node 4 -m ddpm_dist.sample runs/mnist --num-images 50000 --out images.npz

The same seed gives the same images on any number of ranks. A data set that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_dist.command import CommandLine, exit_codes, leave_word, refuse, refuse_on_all
from ddpm_dist.config import MAX_WIDTH, POWER
from ddpm_dist.errors import ConfigError, ExitCode, StopRequested, UserError
from ddpm_dist.evaluation.class_flags import add_class_flags, class_choice
from ddpm_dist.evaluation.drawing import Request, draw_grid
from ddpm_dist.evaluation.image_files import Target
from ddpm_dist.evaluation.sampler_flags import add_sampler_flags, sampler_choice
from ddpm_dist.parallel.environment import RankEnvironment, read_environment
from ddpm_dist.run.directory import RunDirectory, is_weights_file, no_run
from ddpm_dist.run.preemption import StopSignal, ignore_from_now_on

MEANINGS = {
    0: "the images are drawn",
    75: "stopped: the same command goes on with the images that are missing",
    76: "another attempt draws these images now",
    130: "a grid was stopped with Ctrl-C",
}
STOPPED = "stopped before all images were drawn"
EPILOG = exit_codes((65, 70, 78), MEANINGS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises ConfigError."""
    usage = "%(prog)s [options] RUN_DIR"
    parser = CommandLine(prog="python -m ddpm_dist.sample", description=__doc__, epilog=EPILOG, usage=usage)
    parser.add_argument(
        "run_directory",
        type=Path,
        metavar="RUN_DIR",
        help="the run, like runs/mnist; or exported weights, FILE.safetensors",
    )
    # torchrun of Python 3.11 takes --num for an abbreviation of two options of its own, even after the module's name.
    parser.add_argument(
        "--num", type=int, default=64, metavar="N", help="number of images [64]; torchrun: --num-images"
    )
    parser.add_argument("--num-images", type=int, dest="num", metavar="N", help=argparse.SUPPRESS)
    add_sampler_flags(parser)
    add_class_flags(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the images [0]")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint [the newest valid one]")
    parser.add_argument(
        "--weights", metavar="NAME", help="ema, model, or another average that the run keeps, like ema-0.999 [ema]"
    )
    parser.add_argument(
        "--ema", type=float, metavar="WIDTH", help="power-function average of this width, from checkpoint.ema_snapshots"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto is cuda if there is one [auto]"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="grid.png, a folder/, or images.npz [a grid in RUN_DIR/samples]",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank, and print where the images are. Returns the exit code."""
    rank = 0
    try:
        env = read_environment()
        rank = env.rank
        request = request_of(parse(argv))
    except (UserError, OSError) as error:
        code = refuse_on_all(error, rank)
    else:
        as_job = request.is_data_set or env.world_size > 1
        code = _draw_as_job(request, env) if as_job else _draw_grid(request, env)
    if rank == 0:
        leave_word(code)
    return code


def _draw_grid(request: Request, env: RankEnvironment) -> int:
    try:
        print(draw_grid(request, env))
    except (UserError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    return 0


def _draw_as_job(request: Request, env: RankEnvironment) -> int:
    # Before torch is imported, which takes seconds: a stop signal that comes meanwhile is obeyed afterwards.
    with StopSignal().installed(under_launcher=env.launcher != "none") as stop:
        from ddpm_dist.evaluation.job import draw_on_ranks
        from ddpm_dist.parallel.failures import explain

        try:
            path = draw_on_ranks(request, env, stop)
        except StopRequested:
            if env.rank == 0 and not request.is_data_set:
                print(STOPPED, file=sys.stderr, flush=True)
            return ExitCode.PREEMPTED
        except Exception as error:
            code, text = explain(error, env.rank)
            if text:
                print(text, file=sys.stderr, flush=True)
            return code
        if env.rank == 0:
            print(path, flush=True)
    return 0


def request_of(args: argparse.Namespace) -> Request:
    """What the command line asks for. Raises UserError for what cannot be right in any run."""
    if args.num < 1:
        raise ConfigError(f"--num {args.num}: expected at least 1")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: expected at least 0")
    if args.ema is not None and args.weights is not None:
        raise ConfigError(f"--ema {args.ema}: not together with --weights {args.weights}; give one of them")
    if args.ema is not None and not 0 < args.ema <= MAX_WIDTH:
        raise ConfigError(f"--ema {args.ema}: expected a width above 0 and at most {MAX_WIDTH}")
    target = Target.named(args.out) if args.out else None
    if not is_weights_file(args.run_directory) and not RunDirectory(args.run_directory).config_file.exists():
        raise no_run(args.run_directory)
    return Request(
        run=args.run_directory,
        num=args.num,
        seed=args.seed,
        sampler=sampler_choice(args),
        step=args.step,
        weights=args.weights if args.ema is None else f"{POWER}{args.ema}",
        device=args.device,
        target=target,
        classes=class_choice(args),
    )


if __name__ == "__main__":
    exit_code = main()
    ignore_from_now_on()  # a signal that comes after all is done changes nothing
    sys.exit(exit_code)

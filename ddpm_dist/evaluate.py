"""Say how likely a trained run finds images that it was not trained on, in bits per dimension.

    python -m ddpm_dist.evaluate runs/mnist
    python -m ddpm_dist.evaluate runs/mnist --num 10000 --timesteps 999 --json

bits/dim is the variational bound on the negative log-likelihood of the 8-bit pixels. Less is
better. L_T is what is left of an image when all noise is added, L_1 and those above are for undoing
the noise, and L_0 is for the pixels from an image that is nearly clean. An image is measured at 0
and at --timesteps others, spread evenly and at random, so that the mean is that of all timesteps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_dist.command import CommandLine, exit_codes, nobody_reads, refuse
from ddpm_dist.errors import ConfigError, UserError
from ddpm_dist.evaluation.measuring import Measured, Request, measure_run
from ddpm_dist.run.directory import RunDirectory, is_weights_file, no_run

if TYPE_CHECKING:
    from ddpm_dist.evaluation.likelihood import Estimate

EPILOG = exit_codes((65, 70, 78, 130), {0: "all runs are measured"})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises ConfigError."""
    parser = CommandLine(prog="python -m ddpm_dist.evaluate", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "run_directories", type=Path, nargs="+", metavar="RUN_DIR", help="run directories, or FILE.safetensors"
    )
    parser.add_argument("--num", type=int, default=512, metavar="N", help="at most so many images [512]")
    parser.add_argument("--on", choices=["test", "train"], default="test", help="which images of the set [test]")
    parser.add_argument("--timesteps", type=int, metavar="K", help="at how many timesteps of T - 1 [50]")
    parser.add_argument("--variance", metavar="NAME", help="fixed_large, fixed_small or learned [the run's]")
    parser.add_argument("--no-clip", action="store_true", help="do not clip the predicted image to [-1, 1]")
    parser.add_argument("--weights", metavar="NAME", help="ema (the average), model (as trained), ... [ema]")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint [the newest valid one]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of timesteps and noise [0]")
    parser.add_argument("--data-root", metavar="DIR", help="where the images are [data.root of the run]")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if any [auto]")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line for each run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and print a report of each run. Returns the exit code."""
    try:
        args = parse(argv)
        request = request_of(args)
        for path in args.run_directories:
            measured = measure_run(path, request)
            print(json.dumps(measured.as_json()) if args.json else "\n".join(describe(measured)), flush=True)
    except BrokenPipeError:
        return nobody_reads()
    except (UserError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped before all runs were measured", file=sys.stderr)
        return 130
    return 0


def request_of(args: argparse.Namespace) -> Request:
    """What the command line asks for. Raises UserError for what cannot be right in any run."""
    if args.num < 1:
        raise ConfigError(f"--num {args.num}: expected at least 1")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: expected at least 0")
    for path in args.run_directories:
        if not is_weights_file(path) and not RunDirectory(path).config_file.exists():
            raise no_run(path)
    return Request(
        num=args.num,
        on=args.on,
        num_timesteps=args.timesteps,
        variance=args.variance,
        clip=not args.no_clip,
        seed=args.seed,
        step=args.step,
        weights=args.weights,
        data_root=args.data_root,
        device=args.device,
    )


def describe(measured: Measured) -> list[str]:
    """A result as lines of text."""
    found, of = measured.likelihood, measured.of
    clipped = "" if measured.clip else ", not clipped"
    rows = {
        f"L_{of + 1}": found.prior,
        f"L_1 .. L_{of}": found.divergences,
        "L_0": found.decoding,
        "bits/dim": found.total,
    }
    return [
        f"{measured.run}: step {measured.step}, weights {measured.weights}, variance {measured.variance}{clipped}; "
        f"{found.num_images} {measured.images}, {measured.num_timesteps} of {of} timesteps",
        *(f"  {name:<14}{_figure(estimate)}" for name, estimate in rows.items()),
    ]


def _figure(estimate: Estimate) -> str:
    error = estimate.standard_error
    return f"{estimate.mean:8.4f}" + ("" if error is None else f" ± {error:.4f}")


if __name__ == "__main__":
    sys.exit(main())

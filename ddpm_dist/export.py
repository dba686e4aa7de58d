"""Write the weights of a run in a format of other tools, whole or not at all.

    python -m ddpm_dist.export runs/mnist --to safetensors --out mnist.safetensors
    python -m ddpm_dist.export runs/mnist --to diffusers --out mnist-diffusers --license mit

safetensors: one file that `ddpm_dist.sample` reads. diffusers: the folder of a pipeline, with a
card that says how to draw from it. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_dist.command import CommandLine, exit_codes, refuse
from ddpm_dist.errors import ConfigError, UserError
from ddpm_dist.run.directory import RunDirectory, is_weights_file, no_run

EPILOG = exit_codes((65, 70, 78, 130), {0: "the export is written"})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises ConfigError."""
    parser = CommandLine(prog="python -m ddpm_dist.export", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "run_directory", type=Path, metavar="RUN_DIR", help="directory of the run, like runs/mnist; or FILE.safetensors"
    )
    parser.add_argument("--to", required=True, metavar="FORMAT", help="safetensors or diffusers")
    parser.add_argument("--out", required=True, type=Path, metavar="PATH", help="FILE.safetensors, or a new folder")
    parser.add_argument(
        "--weights", metavar="NAME", help="ema, model, or another average of the run, like ema-0.999 [ema]"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint [the newest valid one]")
    parser.add_argument(
        "--license", metavar="ID", help="licence of the weights for the card, like mit [the card names none]"
    )
    parser.add_argument(
        "--register", metavar="NAME", help="register it in MLflow too, as the next version of the model NAME"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and print where the export is, and by which name MLflow loads it. Returns the exit code."""
    try:
        args = parse(argv)
        _check(args)
        _export(args)
    except (UserError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped before all was done; an export is there whole or not at all", file=sys.stderr)
        return 130
    return 0


def _check(args: argparse.Namespace) -> None:
    out: Path = args.out
    if args.register is not None and not re.fullmatch(r"[\w.-][\w .-]*", args.register):
        raise ConfigError(f"--register {args.register}: expected a name of letters, digits, blanks, _, . and -")
    if args.register is not None and is_weights_file(args.run_directory):
        raise ConfigError(
            f"--register {args.register}: {args.run_directory} is a file, which MLflow does not know; give the run "
            "directory"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already, and nothing is overwritten; give another path, or remove it")
    if not is_weights_file(args.run_directory) and not RunDirectory(args.run_directory).config_file.exists():
        raise no_run(args.run_directory)


def _export(args: argparse.Namespace) -> None:
    from ddpm_dist.exporting.formats import FORMATS
    from ddpm_dist.loading import load_run

    if args.to not in FORMATS:
        raise ConfigError(f"--to {args.to}: expected one of {', '.join(FORMATS)}")
    run = load_run(args.run_directory, args.step, args.weights)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[args.to](run, args.out, args.license)
    except OSError as error:
        where, reason = error.filename or args.out, error.strerror or str(error)
        raise ConfigError(f"--out {args.out}: cannot be written ({where}: {reason})") from None
    print(args.out, flush=True)
    if args.register is not None:
        from ddpm_dist.exporting.registration import register

        print(f"models:/{args.register}/{register(run, args.register)}")


if __name__ == "__main__":
    sys.exit(main())

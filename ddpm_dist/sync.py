"""Deliver to MLflow what it has not got yet, and the true state of each run.

    python -m ddpm_dist.sync runs/mnist runs/cifar10

The same command may be given as often as you like: nothing is delivered twice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_dist.command import CommandLine, exit_codes, refuse
from ddpm_dist.errors import ExitCode, UserError
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.address import how_to_look

EPILOG = exit_codes(
    (78, 130),
    {
        0: "all is delivered",
        65: "one of the directories holds no run",
        70: "not all could be delivered: nothing is lost, and the same command tries again",
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine(prog="python -m ddpm_dist.sync", description=__doc__, epilog=EPILOG)
    parser.add_argument("run_directories", type=Path, nargs="+", metavar="RUN_DIR", help="directories of runs")
    try:
        paths = parser.parse_args(argv).run_directories
    except UserError as error:
        return refuse(error)
    worst = 0
    for path in paths:
        try:
            print(f"{path}: delivered, state {_sync(path)}")
            print(f"  MLflow    {how_to_look(RunDirectory(path))}")
        except (UserError, OSError) as error:
            worst = max(worst, refuse(error))
        except KeyboardInterrupt:
            return 130
    return worst


def _sync(path: Path) -> str:
    """The state that MLflow was told. Raises UserError."""
    directory = RunDirectory(path)
    directory.read_config()  # says whether there is a run, before mlflow takes seconds to import

    from ddpm_dist.tracking.delivery import sync
    from ddpm_dist.tracking.shipper import NotDelivered

    try:
        return sync(directory)
    except NotDelivered as error:
        failure = UserError(
            f"{path}: MLflow has not got all of this run; nothing is lost, and the same command delivers the rest "
            f"later ({error})"
        )
        failure.exit_code = ExitCode.SOFTWARE
        raise failure from None


if __name__ == "__main__":
    sys.exit(main())

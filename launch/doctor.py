"""Look whether a request can work on this cluster, before anything is queued.

    python -m launch.doctor --config configs/mnist.yaml --nodes 2 --gpus-per-node 4 --time 4:00:00
    srun OPTIONS python -m launch.doctor --on-node --config configs/mnist.yaml

It takes the arguments of launch.submit, from the root of a checkout. Each line is ok, warning or
error, with what to change. With --on-node, inside an allocation, it looks whether the ranks reach
each other, how fast, and whether they all see and write run.root.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ddpm_dist.command import CommandLine, exit_codes, nobody_reads, refuse
from ddpm_dist.errors import ConfigError, ExitCode, UserError
from launch.checks import examine
from launch.cluster import expand, read_cluster
from launch.request import AS_SBATCH_HAS_IT, Request, add_arguments, from_arguments
from launch.site import look

USAGE = "%(prog)s [OPTIONS] [--config FILE] [section.key=value ...]"
EPILOG = exit_codes(
    (130,), {0: "no line is an error", 78: "a line is an error, or the command line or the config is wrong"}
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLine(
        prog="python -m launch.doctor", hints=AS_SBATCH_HAS_IT, description=__doc__, usage=USAGE, epilog=EPILOG
    )
    parser.add_argument("--on-node", action="store_true", help="probe the network and run.root from these ranks")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="how long to probe [20]")
    add_arguments(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.seconds <= 0:
            raise ConfigError(f"--seconds {args.seconds}: must be above 0")
        request = from_arguments(args)
        return _probe(request, args.seconds) if args.on_node else _examine(request)
    except UserError as error:
        return refuse(error)
    except BrokenPipeError:
        return nobody_reads()
    except KeyboardInterrupt:
        return 130


def _examine(request: Request) -> int:
    cluster = read_cluster()
    excluded = expand(request.exclude) if request.exclude else frozenset[str]()
    findings = examine(request, cluster, look(request.config), excluded)
    for finding in findings:
        print(finding, flush=True)
    return int(ExitCode.CONFIG) if any(finding.level == "error" for finding in findings) else 0


def _probe(request: Request, seconds: float) -> int:
    from ddpm_dist.parallel.probe import probe

    config = request.config
    return probe(config.directory.parent, config.train.device, config.distributed.timeout_seconds, seconds)


if __name__ == "__main__":
    sys.exit(main())

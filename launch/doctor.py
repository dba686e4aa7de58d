"""Look whether a request can work on this cluster, before anything is queued. Takes the arguments of launch.submit.

python -m launch.doctor --config configs/mnist.yaml --nodes 2 --gpus-per-node 4 --partition gpu --time 4:00:00
srun --nodes 2 --ntasks-per-node 4 python -m launch.doctor --on-node --config configs/mnist.yaml

Each line is ok, warning or error, with what to change. Exit code 0 without errors, else 78. With --on-node, inside an
allocation: do the ranks reach each other, how fast, and do they all see and write run.root?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ddpm_dist.command import CommandLine, refuse
from ddpm_dist.errors import ConfigError, ExitCode, UserError
from launch.checks import examine
from launch.cluster import expand, read_cluster
from launch.request import Request, add_arguments, from_arguments
from launch.site import look


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLine(prog="python -m launch.doctor", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--on-node", action="store_true", help="probe the network and run.root from these ranks")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to probe (default 20)")
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


def _examine(request: Request) -> int:
    cluster = read_cluster()
    excluded = expand(request.exclude) if request.exclude else frozenset[str]()
    findings = examine(request, cluster, look(request.config), excluded)
    for finding in findings:
        print(finding)
    return int(ExitCode.CONFIG) if any(finding.level == "error" for finding in findings) else 0


def _probe(request: Request, seconds: float) -> int:
    from ddpm_dist.parallel.probe import probe

    config = request.config
    return probe(config.directory.parent, config.train.device, config.distributed.timeout_seconds, seconds)


if __name__ == "__main__":
    sys.exit(main())

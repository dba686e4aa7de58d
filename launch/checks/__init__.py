"""What can go wrong with a request on a cluster: pure functions of what was asked for and what was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from launch.checks import interruptions, resources, surroundings
from launch.checks.case import Case, Finding
from launch.cluster import Cluster
from launch.cores import default_cores
from launch.request import Request
from launch.site import Site

__all__ = ["CHECKS", "Case", "Finding", "examine"]

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    resources.check_partition,
    resources.check_nodes,
    resources.check_gpus,
    resources.check_cpus,
    interruptions.check_time,
    interruptions.check_preemption,
    interruptions.check_requeue,
    interruptions.check_accounting,
    interruptions.check_shutdown,
    surroundings.check_run_root,
    surroundings.check_space,
    surroundings.check_images,
    surroundings.check_tracking,
    surroundings.check_network,
    surroundings.check_python,
)


def examine(request: Request, cluster: Cluster, site: Site, excluded: frozenset[str] = frozenset()) -> list[Finding]:
    """All findings, in a fixed order; only the partition's where there is none."""
    partition = cluster.partition(request.partition)
    if partition is None:
        asked = f"{request.partition}: no such partition" if request.partition else "none given, and no default"
        return [Finding("error", "partition", f"{asked}; valid: {', '.join(sorted(cluster.partitions))}")]
    if request.cpus_per_task is None:
        request = dataclasses.replace(request, cpus_per_task=default_cores(request, cluster, excluded))
    case = Case(request, cluster, site, partition, excluded)
    return [finding for check in CHECKS for finding in check(case)]

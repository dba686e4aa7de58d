"""How many cores each rank asks for, and how many it needs."""

from __future__ import annotations

from ddpm_dist.config import Config, loader_workers
from launch.cluster import Cluster, Fields, cores_of, gpus_of
from launch.request import Request

# The main thread, autograd, NCCL's proxy and the thread that pins memory share the cores of a rank with its loaders.
COMFORTABLE_WITH_A_GPU = 4  # slurm/train.sbatch warns below the same


def default_cores(request: Request, cluster: Cluster, excluded: frozenset[str] = frozenset()) -> int | None:
    """Cores for each rank where none are asked for: 1 without GPUs, else the share that goes with a GPU.

    Returns:
        None where the cluster has no node of that partition with so many GPUs.
    """
    return cores_per_gpu(request, cluster, excluded) if request.gpus_per_node else 1


def cores_per_gpu(request: Request, cluster: Cluster, excluded: frozenset[str] = frozenset()) -> int | None:
    """The fewest cores for each of its GPUs, of all nodes that this request could run on; at least 1."""
    shares = [
        max(1, cores // gpus_of(node))
        for partition in cluster.partitions_of(request.partition)
        for name, node in cluster.nodes_of(partition).items()
        if name not in excluded and gpus_of(node, request.gpu_type) >= request.gpus_per_node > 0
        for cores in [_allowed(cores_of(node), partition)]
    ]
    return min(shares, default=None)


def cores_needed(config: Config) -> int:
    """What one rank keeps busy: its main thread, or as many as train.threads says, and its loaders."""
    return (config.train.threads or 1) + loader_workers(config.data)


def _allowed(cores: int, partition: Fields) -> int:
    most = partition.get("MaxCPUsPerNode", "UNLIMITED")
    return min(cores, int(most)) if most.isdigit() else cores

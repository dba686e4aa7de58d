"""Whether the cluster has what is asked for: the partition, nodes, GPUs, cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ddpm_dist.config import loader_workers
from launch.checks.case import Case, Finding
from launch.cluster import Fields, cores_of, gpus_of, is_usable
from launch.cores import COMFORTABLE_WITH_A_GPU, cores_needed, cores_per_gpu


def check_partition(case: Case) -> Iterator[Finding]:
    name, request, fields = case.partition["PartitionName"], case.request, case.partition
    if fields.get("State", "UP") != "UP":
        yield Finding("error", "partition", f"{name} is {fields['State']}; give another --partition")
    for option, key in (("account", "AllowAccounts"), ("qos", "AllowQos")):
        asked, allowed = getattr(request, option), fields.get(key, "ALL")
        if asked and allowed != "ALL" and asked not in allowed.split(","):
            yield Finding("error", "partition", f"{name} does not admit --{option} {asked}; valid: {allowed}")
    most = fields.get("MaxNodes", "UNLIMITED")
    if most.isdigit() and request.nodes > int(most):
        yield Finding("error", "partition", f"--nodes {request.nodes}: {name} allows a job {most}")
    else:
        yield Finding("ok", "partition", f"{name}, {len(case.nodes())} node(s)")


def check_nodes(case: Case) -> Iterator[Finding]:
    """Whether enough nodes have all that is asked of a node, and what they lack."""
    request, nodes = case.request, case.nodes()
    gpus = f"{request.gpu_type} GPUs" if request.gpu_type else "GPUs"
    wanted: dict[str, tuple[int, Callable[[Fields], int]]] = {
        "CPUs": (request.tasks_per_node * (request.cpus_per_task or 1), cores_of),
        gpus: (request.gpus_per_node, lambda node: gpus_of(node, request.gpu_type)),
        "MB of memory": (_megabytes(request.mem), lambda node: int(node.get("RealMemory", 0))),
    }
    lacks: list[Finding] = []
    for what, (least, has) in wanted.items():
        enough = [name for name, node in nodes.items() if has(node) >= least]
        if len(enough) < min(request.nodes, len(nodes)) or (len(nodes) < request.nodes and not lacks):
            most = max((has(node) for node in nodes.values()), default=0)
            text = f"{least} {what} a node asked for: {len(enough)} node(s) have them, at most {most}"
            lacks.append(Finding("error", "nodes", text))
    yield from lacks
    if lacks:
        return
    if request.constraint and request.constraint.isidentifier():
        nodes = {n: f for n, f in nodes.items() if request.constraint in f.get("AvailableFeatures", "").split(",")}
        if len(nodes) < request.nodes:
            yield Finding("error", "nodes", f"--constraint {request.constraint}: {len(nodes)} node(s) have it")
            return
    usable = [name for name, node in nodes.items() if is_usable(node)]
    if len(usable) < request.nodes:
        away = ", ".join(f"{name} {node.get('State', '')}" for name, node in nodes.items() if name not in usable)
        yield Finding("warning", "nodes", f"--nodes {request.nodes}: {len(usable)} can be used now ({away}); it waits")
    else:
        yield Finding("ok", "nodes", f"{request.nodes} of {len(usable)}, {request.world_size} rank(s)")


def check_gpus(case: Case) -> Iterator[Finding]:
    request = case.request
    there = max((gpus_of(node, request.gpu_type) for node in case.nodes().values()), default=0)
    shards = request.config.elastic.shards
    if request.gpus_per_node > there:
        return  # check_nodes has said so
    if request.gpus_per_node > request.tasks_per_node:
        idle = request.gpus_per_node - request.tasks_per_node
        yield Finding("warning", "GPUs", f"{idle} of {request.gpus_per_node} a node stay idle: one rank uses one GPU")
    elif there and not request.gpus_per_node:
        yield Finding("warning", "GPUs", f"the nodes have up to {there}, and none is asked for: --gpus-per-node")
    elif request.gpus_per_node and request.config.train.device == "cpu":
        yield Finding("warning", "GPUs", "asked for, but train.device=cpu")
    elif request.gpus_per_node < there and shards % there:
        most = max(ranks for ranks in range(1, there) if shards % ranks == 0)
        text = f"the nodes have {there} GPUs, whose ranks cannot share elastic.shards={shards}: --gpus-per-node={most}"
        yield Finding(
            "warning", "GPUs", f"{text} is the most; a new run may set elastic.shards to a multiple of {there}"
        )
    else:
        yield Finding("ok", "GPUs", f"{request.gpus_per_node} a node, one for each of {request.tasks_per_node} rank(s)")


def check_cpus(case: Case) -> Iterator[Finding]:
    """Whether the main thread and the loaders of each rank find a core of their own."""
    request, config = case.request, case.request.config
    there = request.cpus_per_task or 1
    need, workers = cores_needed(config), loader_workers(config.data)
    share = cores_per_gpu(request, case.cluster, case.excluded) or 1
    if need > there:
        yield Finding(
            "warning",
            "CPUs",
            f"--cpus-per-task {there}: a rank wants {need} ({need - workers} for its main thread and train.threads, "
            f"{workers} loader process(es) of data.num_workers); with fewer it slows down by far more than that",
        )
    elif request.gpus_per_node and there < min(COMFORTABLE_WITH_A_GPU, share):
        text = f"--cpus-per-task {there}: with each GPU come {share} cores, and a rank keeps some threads busy"
        yield Finding("warning", "CPUs", f"{text}; give --cpus-per-task={share}")
    else:
        yield Finding("ok", "CPUs", f"{there} for each rank, which needs {need}")


def _megabytes(mem: str | None) -> int:
    """sbatch's `64G`, `500M`, `2T` or plain megabytes; 0 where none is asked for, or all of it."""
    if not mem:
        return 0
    number, unit = (mem[:-1], mem[-1].upper()) if mem[-1].isalpha() else (mem, "M")
    factor = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}.get(unit, 0)
    return int(float(number) * factor) if number.replace(".", "", 1).isdigit() else 0

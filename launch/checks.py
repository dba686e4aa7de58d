"""What can go wrong with a request on a cluster: pure functions of what was asked for and what was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlparse

from ddpm_dist.config import loader_workers
from launch.cluster import Cluster, Fields, cores_of, gpus_of, is_usable, seconds_in
from launch.cores import COMFORTABLE_WITH_A_GPU, cores_needed, cores_per_gpu, default_cores
from launch.request import Request
from launch.site import Site, is_network

Level = Literal["ok", "warning", "error"]
EARLY_SECONDS = 60  # SLURM may send --signal so much earlier than asked for
MARGIN_SECONDS = 1.0  # of a GraceTime, seen to be shorter than it says


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:8} {self.subject:14} {self.text}"


@dataclass(frozen=True)
class Case:
    """All that a check may look at.

    Attributes:
        partition: that the job would run in.
        excluded: nodes that the request leaves out.
    """

    request: Request
    cluster: Cluster
    site: Site
    partition: Fields
    excluded: frozenset[str] = frozenset()

    def nodes(self) -> dict[str, Fields]:
        found = self.cluster.nodes_of(self.partition)
        return {name: fields for name, fields in found.items() if name not in self.excluded}


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
    """Whether enough nodes have all that is asked of a node, and which lack is to blame."""
    request, nodes = case.request, case.nodes()
    gpus = f"{request.gpu_type} GPUs" if request.gpu_type else "GPUs"
    wanted: dict[str, tuple[int, Callable[[Fields], int]]] = {
        "CPUs": (request.tasks_per_node * (request.cpus_per_task or 1), cores_of),
        gpus: (request.gpus_per_node, lambda node: gpus_of(node, request.gpu_type)),
        "MB of memory": (_megabytes(request.mem), lambda node: int(node.get("RealMemory", 0))),
    }
    for what, (least, has) in wanted.items():
        enough = [name for name, node in nodes.items() if has(node) >= least]
        if len(enough) < request.nodes:
            most = max((has(node) for node in nodes.values()), default=0)
            yield Finding(
                "error", "nodes", f"{least} {what} a node asked for: {len(enough)} node(s) have them, at most {most}"
            )
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


def check_time(case: Case) -> Iterator[Finding]:
    request, partition = case.request, case.partition
    most, default = seconds_in(partition.get("MaxTime", "")), seconds_in(partition.get("DefaultTime", ""))
    if request.minutes is None:
        if default is None and most is None:
            yield Finding("ok", "time", "no limit")
            return
        limit = default if default is not None else most or 0
        yield Finding("warning", "time", f"no --time given: the partition's default, {limit // 60} min, counts")
    else:
        limit = request.minutes * 60
    if most is not None and limit > most:
        yield Finding("error", "time", f"--time {limit // 60} min: the partition allows {most // 60} min")
        return
    lead = request.signal_seconds
    if lead >= limit:
        yield Finding(
            "error", "time", f"--signal-lead {lead} s: as long as the limit, {limit} s: it would stop at once"
        )
    elif lead + EARLY_SECONDS >= limit:
        yield Finding(
            "warning", "time", f"--signal-lead {lead} s: SLURM may send it {EARLY_SECONDS} s early; limit {limit} s"
        )
    elif lead < case.site.save_seconds + MARGIN_SECONDS:
        yield Finding(
            "error", "time", f"--signal-lead {lead} s: a save takes {case.site.save_seconds:.1f} s; give more"
        )
    else:
        yield Finding("ok", "time", f"limit {limit // 60} min, told to save {lead} s before")


def check_preemption(case: Case) -> Iterator[Finding]:
    mode = case.cluster.preempt_mode(case.partition)
    if mode.startswith("OFF"):
        yield Finding("ok", "preemption", "none in this partition")
        return
    if "SUSPEND" in mode or "GANG" in mode:
        yield Finding("warning", "preemption", f"PreemptMode={mode}: jobs are stopped in place; ranks may time out")
        return
    if "CANCEL" in mode:
        yield Finding("warning", "preemption", "PreemptMode=CANCEL: comes back as another job, with another id")
    grace = seconds_in(case.partition.get("GraceTime", "0")) or 0
    kill = seconds_in(case.cluster.config.get("KillWait", "30 sec")) or 0
    save = case.site.save_seconds + MARGIN_SECONDS
    words = f"GraceTime {grace} s + KillWait {kill} s; a save takes {case.site.save_seconds:.1f} s"
    if save > grace + kill:
        yield Finding("error", "preemption", f"{words}: killed before it is saved; set checkpoint.every_seconds")
    elif save > grace:
        yield Finding("warning", "preemption", f"{words}: only KillWait leaves time for it")
    else:
        user = "preempt_send_user_signal" in case.cluster.config.get("SlurmctldParameters", "")
        signal = "--signal's USR2" if user else "SIGTERM"
        yield Finding("ok", "preemption", f"{words}; told by {signal}")


def check_requeue(case: Case) -> Iterator[Finding]:
    if case.cluster.config.get("JobRequeue", "1") == "0":
        yield Finding(
            "warning", "requeue", "JobRequeue=0: we ask for --requeue; where refused a successor is submitted"
        )
    else:
        yield Finding("ok", "requeue", f"allowed; at most {case.request.max_requeues} times")


def check_accounting(case: Case) -> Iterator[Finding]:
    if case.cluster.sacct:
        yield Finding("ok", "accounting", "sacct answers")
    else:
        yield Finding("warning", "accounting", "no sacct: states of ended jobs are forgotten; status.json keeps them")


def check_shutdown(case: Case) -> Iterator[Finding]:
    given = case.site.environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    grace = seconds_in(case.partition.get("GraceTime", "0")) or 0
    need = max(grace, case.request.signal_seconds) + (seconds_in(case.cluster.config.get("KillWait", "30 sec")) or 0)
    if given is not None and (not given.isdigit() or int(given) < need):
        text = f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={given}: torchrun would kill sooner than SLURM ({need} s); unset it"
        yield Finding("warning", "torchrun", text)
    else:
        yield Finding("ok", "torchrun", f"leaves workers {given or need} s to save")


def check_run_root(case: Case) -> Iterator[Finding]:
    request, site = case.request, case.site
    root = request.config.directory.parent
    if site.trouble:
        yield Finding("error", "run.root", f"cannot be written: {site.trouble}")
    elif not site.links_are_exclusive:
        yield Finding("error", "run.root", f"{root} ({site.file_system}): link(2) is not exclusive; two could write")
    elif not is_network(site.file_system):
        text = f"{root} is on {site.file_system}, which looks local: do the nodes see it? `--on-node` tells"
        yield Finding("warning", "run.root", text)
    else:
        yield Finding("ok", "run.root", f"{root} on {site.file_system}, writable")


def check_space(case: Case) -> Iterator[Finding]:
    config, site = case.request.config.checkpoint, case.site
    need = site.checkpoint_bytes * (config.keep_last + 1)
    words = f"{_gigabytes(site.free_bytes)} free, {_gigabytes(need)} for {config.keep_last} checkpoints and a new one"
    if site.free_bytes < need:
        yield Finding("error", "space", f"{words}; lower checkpoint.keep_last or give another run.root")
    elif config.keep_every is not None:
        text = f"{words}, and {_gigabytes(site.checkpoint_bytes)} for ever every {config.keep_every} steps"
        yield Finding("warning", "space", f"{text} (checkpoint.keep_every)")
    else:
        yield Finding("ok", "space", f"{words} (quotas are not seen)")


def check_tracking(case: Case) -> Iterator[Finding]:
    site = case.site
    if not case.request.config.tracking.enabled:
        yield Finding("ok", "MLflow", "off")
    elif site.tracking_trouble:
        text = f"{site.tracking_uri}: {site.tracking_trouble}; training goes on without it, `sync` delivers later"
        yield Finding("error", "MLflow", text)
    elif site.tracking_uri is None and is_network(site.file_system):
        text = f"SQLite on {site.file_system}: several runs at once may wait for each other; a server is safer"
        yield Finding("warning", "MLflow", f"{text} (tracking.uri)")
    elif urlparse(site.tracking_uri or "").hostname in ("localhost", "127.0.0.1", "::1"):
        yield Finding("error", "MLflow", f"{site.tracking_uri}: on the nodes that is another machine; give its name")
    else:
        yield Finding("ok", "MLflow", site.tracking_uri or "mlflow.db in run.root")


def check_network(case: Case) -> Iterator[Finding]:
    virtual = [name for name in case.site.interfaces if name.startswith(("docker", "virbr", "br-", "cni", "tailscale"))]
    chosen = case.site.environment.get("NCCL_SOCKET_IFNAME")
    if case.request.nodes > 1 and case.request.gpus_per_node and virtual and not chosen:
        text = f"{', '.join(virtual)}: NCCL may choose it; export NCCL_SOCKET_IFNAME=^{','.join(virtual)}"
        yield Finding("warning", "network", text)
    else:
        yield Finding("ok", "network", f"NCCL_SOCKET_IFNAME={chosen}" if chosen else "nothing that NCCL would mistake")


def check_python(case: Case) -> Iterator[Finding]:
    if case.request.python is None and not is_network(case.site.python_file_system):
        text = f"this interpreter is on {case.site.python_file_system}, which looks local: do the nodes have it?"
        yield Finding("warning", "python", text)
    else:
        yield Finding("ok", "python", case.request.python or f"on {case.site.python_file_system}")


CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    check_partition,
    check_nodes,
    check_gpus,
    check_cpus,
    check_time,
    check_preemption,
    check_requeue,
    check_accounting,
    check_shutdown,
    check_run_root,
    check_space,
    check_tracking,
    check_network,
    check_python,
)


def _megabytes(mem: str | None) -> int:
    """sbatch's `64G`, `500M`, `2T` or plain megabytes; 0 where none is asked for, or all of it."""
    if not mem:
        return 0
    number, unit = (mem[:-1], mem[-1].upper()) if mem[-1].isalpha() else (mem, "M")
    factor = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}.get(unit, 0)
    return int(float(number) * factor) if number.replace(".", "", 1).isdigit() else 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"

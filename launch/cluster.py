"""What SLURM says of its configuration, partitions and nodes, read once with `scontrol show`."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from ddpm_dist.errors import ConfigError

Fields = dict[str, str]


@dataclass(frozen=True)
class Cluster:
    """A cluster, in the fields that SLURM names.

    Attributes:
        config: of slurm.conf and its defaults.
        partitions: by name.
        nodes: by name.
        sacct: whether accounting answers.
    """

    config: Fields
    partitions: dict[str, Fields]
    nodes: dict[str, Fields]
    sacct: bool

    def partition(self, name: str | None) -> Fields | None:
        """The named one, or the default; None if there is none."""
        if name is not None:
            return self.partitions.get(name)
        return next((fields for fields in self.partitions.values() if fields.get("Default") == "YES"), None)

    def partitions_of(self, names: str | None) -> list[Fields]:
        """Those of a list as sbatch takes it (`gpu,long`), or the default one; unknown names are left out."""
        asked = [None] if names is None else names.split(",")
        return [fields for name in asked if (fields := self.partition(name)) is not None]

    def nodes_of(self, partition: Fields) -> dict[str, Fields]:
        name = partition["PartitionName"]
        return {node: fields for node, fields in self.nodes.items() if name in fields.get("Partitions", "").split(",")}

    def preempt_mode(self, partition: Fields) -> str:
        """REQUEUE, CANCEL, SUSPEND, GANG or OFF: the partition's, else the cluster's; OFF where nothing preempts."""
        if self.config.get("PreemptType", "preempt/none") == "preempt/none":
            return "OFF"
        return (partition.get("PreemptMode") or self.config.get("PreemptMode", "OFF")).upper()


def read_cluster() -> Cluster:
    """Raises ConfigError where there is no SLURM, or it does not answer."""
    config = parse_config(_ask("config"))
    partitions, nodes = parse_lines(_ask("partition", "--oneliner")), parse_lines(_ask("node", "--oneliner"))
    return Cluster(
        config,
        {fields["PartitionName"]: fields for fields in partitions},
        {fields["NodeName"]: fields for fields in nodes},
        sacct=sacct_answers(),
    )


def expand(node_list: str) -> frozenset[str]:
    """`node[1-3]` -> its nodes. Raises ConfigError where SLURM does not understand it."""
    return frozenset(_ask("hostnames", node_list).split())


def parse_config(text: str) -> Fields:
    """`Key   = value` on each line."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_lines(text: str) -> list[Fields]:
    """`Key=value Key=value ...` on each line; values may hold blanks and further `=`."""
    lines = (line for line in text.splitlines() if "=" in line)
    return [dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line)) for line in lines]


def seconds_in(text: str) -> int | None:
    """`5 sec`, `10`, `1-00:00:00`, `01:00:00`; None for UNLIMITED, NONE and the like."""
    if found := re.fullmatch(r"(\d+)(?: sec)?", text):
        return int(found[1])
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?", text):
        days, hours, minutes, seconds = (int(group or 0) for group in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return None


def gpus_of(node: Fields, gpu_type: str | None = None) -> int:
    """`gpu:a100:4(S:0-1),shm:1` -> 4; of one type only, if it is given."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,(]+))?:(\d+)", node.get("Gres", ""))
    return sum(int(count) for name, count in found if gpu_type in (None, name))


def cores_of(node: Fields) -> int:
    """What jobs may use there: without the cores that SLURM keeps for the system, where it says so."""
    return int(node.get("CPUEfctv") or node.get("CPUTot") or 0)


def is_usable(node: Fields) -> bool:
    """Whether the node takes jobs: at once, or when those that run there have ended."""
    return not re.search("DOWN|DRAIN|FAIL|NOT_RESPONDING|MAINT|POWER", node.get("State", ""))


def _ask(*what: str) -> str:
    if shutil.which("scontrol") is None:
        raise ConfigError("no scontrol here: run it on a machine that submits jobs (a login node)")
    try:
        asked = subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"scontrol show {' '.join(what)}: SLURM's controller does not answer") from None
    if asked.returncode:
        said = (asked.stderr or asked.stdout).strip().splitlines() or ["no reason given"]
        hint = "; run it on a machine that submits jobs (a login node)" if what == ("config",) else ""
        raise ConfigError(f"scontrol show {' '.join(what)}: {said[-1]}{hint}")
    return asked.stdout


def sacct_answers() -> bool:
    """Whether this cluster keeps accounts of jobs, and lets us read them."""
    if shutil.which("sacct") is None:
        return False
    argv = ("sacct", "--allocations", "--noheader", "--starttime=now")
    try:
        return subprocess.run(argv, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False

"""Which rank this process is, read from its environment. No torch is imported here."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ddpm_dist.errors import ConfigError


@dataclass(frozen=True)
class RankEnvironment:
    """This process among its peers.

    Attributes:
        rank, world_size: among all processes of the job.
        local_rank, local_world_size: among those on this node.
        launcher: who has started them; none means a single process.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: Literal["torchrun", "slurm", "none"]


def read_environment(environ: Mapping[str, str] | None = None) -> RankEnvironment:
    """Which rank this is: by torchrun's variables, else by those of a SLURM step (srun), else one process alone.

    A SLURM batch script itself is one process: only a step's tasks carry SLURM_STEP_ID.

    Raises:
        ConfigError: a variable is missing or not a number.
    """
    env = os.environ if environ is None else environ
    torchrun = "RANK" in env and "WORLD_SIZE" in env
    launcher: Literal["torchrun", "slurm"] = "torchrun" if torchrun else "slurm"
    found = RankEnvironment(0, 0, 1, 1, "none")
    try:
        if torchrun:
            world_size = int(env["WORLD_SIZE"])
            local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
            found = RankEnvironment(int(env["RANK"]), int(env["LOCAL_RANK"]), world_size, local_world_size, launcher)
        elif "SLURM_STEP_ID" in env and (world_size := int(env.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            rank, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
            found = RankEnvironment(rank, local_rank, world_size, _tasks_on_this_node(env), launcher)
        elif "RANK" in env:
            raise ConfigError(f"RANK={env['RANK']} is set without WORLD_SIZE; start with torchrun or srun, or unset it")
    except KeyError as missing:
        raise ConfigError(f"{launcher} environment: {missing} is not set; start with torchrun or srun") from None
    except ValueError as error:
        raise ConfigError(f"{launcher} environment: {error}; start with torchrun or srun") from None
    if not 0 <= found.rank < found.world_size:
        raise ConfigError(f"{launcher} environment: rank {found.rank} of {found.world_size} ranks cannot be")
    return found


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """How many tasks of the step run here: SLURM_STEP_TASKS_PER_NODE lists them by node, like `4(x2),1`."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[-1]


def rendezvous_from_slurm(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for a SLURM step: the step's first node, a port from job, step and restart.

    A value that the user has set is kept.
    """
    env = os.environ if environ is None else environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "localhost")
    identity = "-".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    # Below 32768: from there on Linux gives ports to clients, and ours might be taken.
    port = 15000 + sum(ord(char) * 31**place for place, char in enumerate(identity)) % 17000
    return {
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(nodes),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }


def srun_wait_seconds(timeout_seconds: float) -> int:
    """What `srun --wait` needs: how long the ranks of a run may go on after the first of them has ended.

    They notice it after distributed.timeout_seconds at the latest, and then need up to 12 s to find out who is silent
    and to write that down (see watchdog.py). A node that went down silently never reports its task: srun must not
    wait for ever.
    """
    return math.ceil(timeout_seconds) + 60


def _first_host(nodes: str) -> str:
    """`gpu[03-07,9],x1` -> `gpu03`. Lists of a rarer form are left to scontrol."""
    simple = re.match(r"^([^\[\],]+)(?:\[(\d+)[^\]]*\])?(?:,|$)", nodes)
    if simple:
        return simple[1] + (simple[2] or "")
    answer = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30
    )
    return answer.stdout.split()[0]


def node_name(environ: Mapping[str, str] | None = None) -> str:
    """This node's name as SLURM knows it (`sbatch --exclude` wants that one); outside of SLURM, its host name."""
    env = os.environ if environ is None else environ
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def cpu_threads(world: RankEnvironment, environ: Mapping[str, str] | None = None) -> int:
    """How many cores this rank has for itself, at least 1. With a single thread more it runs many times slower.

    That is never os.cpu_count(): a job may use only what its affinity and SLURM_CPUS_PER_TASK allow.
    """
    env = os.environ if environ is None else environ
    cores = len(os.sched_getaffinity(0))
    per_task = env.get("SLURM_CPUS_PER_TASK", "")
    if world.launcher == "slurm":
        return max(1, min(cores, int(per_task) if per_task.isdigit() else 1))  # SLURM gives a task one by default
    if per_task.isdigit():
        cores = min(cores, int(per_task))
    return max(1, cores // world.local_world_size)

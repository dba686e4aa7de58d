"""Which rank a process is, from the variables that launchers really set; nonsense is refused, not guessed at."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from typing import Any

import pytest

from ddpm_dist.errors import ConfigError
from ddpm_dist.parallel.environment import (
    RankEnvironment,
    cpu_threads,
    node_name,
    read_environment,
    rendezvous_from_slurm,
)

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu01"}
SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "9",
    "SLURM_NNODES": "3",
    "SLURM_NODELIST": "gpu[03-05]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SLURM_STEP = {
    **SLURM_JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


def world(launcher: Any = "none", local_world_size: int = 1) -> RankEnvironment:
    return RankEnvironment(0, 0, local_world_size, local_world_size, launcher)


# Ranks


def test_no_launcher_means_one_process() -> None:
    assert read_environment({}) == RankEnvironment(0, 0, 1, 1, "none")


def test_torchrun_says_which_rank_this_is() -> None:
    assert read_environment(TORCHRUN) == RankEnvironment(5, 1, 8, 4, "torchrun")


def test_torchrun_inside_a_slurm_step_beats_slurm() -> None:
    assert read_environment({**SLURM_STEP, **TORCHRUN}) == RankEnvironment(5, 1, 8, 4, "torchrun")


def test_a_slurm_step_says_which_rank_this_is() -> None:
    assert read_environment(SLURM_STEP) == RankEnvironment(6, 2, 9, 4, "slurm")


@pytest.mark.parametrize(
    ("tasks_per_node", "counts"),
    [("4(x2),1", [4, 4, 1]), ("1", [1]), ("8", [8]), ("2(x3)", [2, 2, 2]), ("1,2(x2),3", [1, 2, 2, 3])],
)
def test_tasks_of_each_node_are_counted(tasks_per_node: str, counts: list[int]) -> None:
    step = {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_TASKS_PER_NODE": tasks_per_node}
    found = [read_environment({**step, "SLURM_NODEID": str(node)}).local_world_size for node in range(len(counts))]
    assert found == counts


def test_a_batch_script_is_one_process_however_many_tasks_its_job_has() -> None:
    assert read_environment(SLURM_JOB) == RankEnvironment(0, 0, 1, 1, "none")
    without_step = {name: value for name, value in SLURM_STEP.items() if name != "SLURM_STEP_ID"}
    assert read_environment(without_step) == RankEnvironment(0, 0, 1, 1, "none")


def test_a_step_of_one_task_is_one_process() -> None:
    assert read_environment({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1"}).world_size == 1


def test_a_rank_without_a_world_size_is_refused_and_not_taken_for_one_process() -> None:
    with pytest.raises(ConfigError, match="RANK=3 is set without WORLD_SIZE"):
        read_environment({"RANK": "3", "LOCAL_RANK": "3"})


@pytest.mark.parametrize("missing", ["LOCAL_RANK"])
def test_a_missing_variable_of_torchrun_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        read_environment({name: value for name, value in TORCHRUN.items() if name != missing})


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID"])
def test_a_missing_variable_of_slurm_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        read_environment({name: value for name, value in SLURM_STEP.items() if name != missing})


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("garbage", ["x", "", "1.5"])
def test_garbage_from_torchrun_is_refused(name: str, garbage: str) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        read_environment({**TORCHRUN, name: garbage})


@pytest.mark.parametrize(
    ("name", "garbage"),
    [
        ("SLURM_STEP_NUM_TASKS", "x"),
        ("SLURM_STEP_NUM_TASKS", ""),
        ("SLURM_PROCID", "x"),
        ("SLURM_LOCALID", "1.5"),
        ("SLURM_NODEID", "x"),
        ("SLURM_STEP_TASKS_PER_NODE", "x"),
        ("SLURM_STEP_TASKS_PER_NODE", "4(y2)"),
        ("SLURM_STEP_TASKS_PER_NODE", ""),
    ],
)
def test_garbage_from_slurm_is_refused(name: str, garbage: str) -> None:
    with pytest.raises(ConfigError, match="slurm"):
        read_environment({**SLURM_STEP, name: garbage})


def test_the_real_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_environment().rank == 5


# Rendezvous


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-07,9],x1", "gpu03"),
        ("gpu[3,05]", "gpu3"),
        ("x1,gpu[03-07]", "x1"),
        ("gpu03", "gpu03"),
        ("gpu03,gpu04", "gpu03"),
        ("node-a.cluster.org", "node-a.cluster.org"),
        ("rack-1-gpu[001-100]", "rack-1-gpu001"),
        ("gpu[007]", "gpu007"),
    ],
)
def test_the_first_host_of_the_step_is_the_master(nodes: str, first: str) -> None:
    assert rendezvous_from_slurm({**SLURM_STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_rarer_list_is_left_to_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def scontrol(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="r1n3\nr1n4\nr2n3\n")

    monkeypatch.setattr(subprocess, "run", scontrol)
    nodes = "r[1-2]n[3-4]"
    assert rendezvous_from_slurm({**SLURM_STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == "r1n3"
    assert asked == [["scontrol", "show", "hostnames", nodes]]


def port(**changes: str) -> int:
    return int(rendezvous_from_slurm({**SLURM_STEP, **changes})["MASTER_PORT"])


def test_all_ranks_of_a_step_agree_on_the_port() -> None:
    assert len({port(SLURM_PROCID=str(rank), SLURM_LOCALID="0", SLURM_NODEID=str(rank)) for rank in range(9)}) == 1


def test_ports_are_neither_privileged_nor_handed_out_to_clients() -> None:
    ports = [port(SLURM_JOB_ID=str(job), SLURM_RESTART_COUNT=str(job % 7)) for job in range(1, 10**7, 4999)]
    assert min(ports) >= 1024
    assert max(ports) < 32768
    assert len(set(ports)) > 1000, "they are spread out"


def test_ports_differ_between_jobs_steps_and_restarts() -> None:
    assert len({port(SLURM_JOB_ID=str(job)) for job in range(4700, 4800)}) == 100
    assert len({port(SLURM_STEP_ID=str(step)) for step in range(10)}) == 10
    assert len({port(SLURM_RESTART_COUNT=str(count)) for count in range(10)}) == 10


def test_what_the_user_has_set_is_kept() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    assert rendezvous_from_slurm({**SLURM_STEP, **given}) == given


# Threads


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)


@pytest.mark.usefixtures("sixteen_cores")
def test_one_process_has_all_cores_that_it_may_use_but_not_all_there_are() -> None:
    assert cpu_threads(world(), {}) == 16


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize(("ranks", "threads"), [(2, 8), (3, 5), (16, 1), (64, 1)])
def test_ranks_of_torchrun_share_the_cores(ranks: int, threads: int) -> None:
    assert cpu_threads(world("torchrun", ranks), {}) == threads


@pytest.mark.usefixtures("sixteen_cores")
def test_ranks_of_torchrun_share_what_slurm_gave_the_task() -> None:
    assert cpu_threads(world("torchrun", 4), {"SLURM_CPUS_PER_TASK": "8"}) == 2


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize(("per_task", "threads"), [("6", 6), ("1", 1), ("64", 16)])
def test_a_slurm_task_has_its_own_cores(per_task: str, threads: int) -> None:
    assert cpu_threads(world("slurm", 4), {"SLURM_CPUS_PER_TASK": per_task}) == threads


@pytest.mark.usefixtures("sixteen_cores")
def test_a_slurm_task_that_asked_for_no_cores_has_one() -> None:
    assert cpu_threads(world("slurm", 4), {}) == 1


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize("launcher", ["none", "torchrun", "slurm"])
@pytest.mark.parametrize("garbage", ["x", "", "0", "-3", "2.5"])
def test_garbage_for_the_cores_is_refused_or_passed_over(launcher: str, garbage: str) -> None:
    with contextlib.suppress(ConfigError):
        assert 1 <= cpu_threads(world(launcher, 2), {"SLURM_CPUS_PER_TASK": garbage}) <= 16


# Nodes


def test_a_node_has_the_name_that_exclude_wants() -> None:
    assert node_name({"SLURMD_NODENAME": "gpu03"}) == "gpu03"
    assert node_name({}) == node_name({"SLURMD_NODENAME": ""}) == socket.gethostname()

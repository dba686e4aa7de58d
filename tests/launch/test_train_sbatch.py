"""slurm/train.sbatch up to srun and after it, on nodes and with requests that the cluster of tests/slurm does not have.

scontrol, srun, sbatch and Python are scripts here; tests/slurm runs it on a real SLURM.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
CONFIG = "configs/quickstart.yaml"


class Node:
    """A node, and a job that begins there."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"
        (root / "bin").mkdir()
        self.can_requeue(True)
        self.knows_nodes("")
        self.shows("TresPerNode=gres:gpu:2")
        self.python(f"echo {self.run}")
        self.script("srun", "exit 0")
        self.script("sleep", "exit 0")

    def script(self, name: str, body: str) -> None:
        """Leaves a line with its arguments, each in brackets."""
        path = self.root / "bin" / name
        path.write_text(f'#!/bin/bash\nprintf "[%s]" "$@" >>{self.root}/{name}\necho >>{self.root}/{name}\n{body}\n')
        path.chmod(0o755)

    def python(self, where: str) -> None:
        self.script("python", where)

    def shows(self, fields: str) -> None:
        (self.root / "job").write_text(f"JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 {fields}\n")

    def knows_nodes(self, fields: str) -> None:
        """What scontrol says of both nodes."""
        lines = [f"NodeName=node{number} {fields} State=MIXED" for number in (1, 2)] if fields else []
        (self.root / "nodes").write_text("".join(f"{line}\n" for line in lines))

    def can_requeue(self, answer: bool) -> None:
        refused = "" if answer else '[ "$1" = requeue ] && exit 1\n'
        self.script(
            "scontrol",
            f'{refused}case "$2" in job) cat {self.root}/job ;; node) cat {self.root}/nodes ;; '
            "hostnames) echo node1 ;; esac; exit 0",
        )
        self.script("sbatch", "exit 0")

    def start(self, restart: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "DDPM", "PYTHON"))
        }
        environment |= {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "ddpm",
            "SLURM_JOB_PARTITION": "gpu",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
            "SLURM_CPUS_ON_NODE": "4",
            "SLURM_RESTART_COUNT": str(restart),
            **variables,
        }
        argv = ["bash", "slurm/train.sbatch", CONFIG]
        return subprocess.run(argv, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self, name: str) -> list[str]:
        path = self.root / name
        return path.read_text().splitlines() if path.exists() else []

    def requeues(self) -> list[str]:
        return [call for call in self.calls("scontrol") if "[requeue]" in call]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_node_that_cannot_start_what_another_one_could_is_left(node: Node) -> None:
    node.python("exit 127")
    started = node.start(restart=5)
    assert started.returncode == 127
    assert node.requeues() == ["[requeue][7]"]
    assert "cannot start the trainer (exit code 127): requeued" in started.stderr
    assert not node.calls("srun")


@pytest.mark.parametrize(("restart", "allowed"), [(0, "1000"), (5, "5")])
def test_what_never_started_is_not_tried_for_ever(node: Node, restart: int, allowed: str) -> None:
    node.python("exit 127")
    assert node.start(restart, MAX_REQUEUES=allowed).returncode == 127
    assert node.requeues() == []


def test_an_array_task_is_requeued_by_its_own_name(node: Node) -> None:
    node.python("exit 1")
    node.start(restart=1, SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="3")
    assert node.requeues() == ["[requeue][6_3]"]


def test_a_start_that_fails_once_is_tried_again(node: Node) -> None:
    node.python(f"[ -e {node.root}/mounted ] || {{ touch {node.root}/mounted; exit 143; }}; echo {node.run}")
    node.start()
    assert len(node.calls("srun")) == 1
    assert (node.run / "slurm.log").exists()


@pytest.mark.parametrize("code", [65, 78])
def test_a_config_that_is_refused_ends_it_at_once(node: Node, code: int) -> None:
    node.python(f"exit {code}")
    assert node.start(restart=5).returncode == code
    assert (len(node.calls("python")), node.requeues()) == (1, [])


def test_where_a_bound_is_reached_nothing_starts(node: Node) -> None:
    assert node.start(restart=3, MAX_REQUEUES="2").returncode != 0
    assert node.calls("srun") == []


def test_of_unequal_nodes_the_smallest_counts(node: Node) -> None:
    node.start(SLURM_JOB_CPUS_PER_NODE="128,2(x3),64", SLURM_CPUS_ON_NODE="128")
    (call,) = node.calls("srun")
    assert "[--cpus-per-task=2]" in call
    assert "[--nproc-per-node=2]" in call


@pytest.mark.parametrize(
    ("shown", "asked"),
    [
        ("TresPerNode=gres:gpu:a100:4", "[--gres=gpu:a100:4]"),
        ("TresPerNode=gres/gpu:4", "[--gres=gpu:4]"),
        ("TresPerJob=gres:gpu:8", "[--gpus=8]"),
        ("TresPerJob=gres/gpu:a100:8", "[--gpus=a100:8]"),
        ("TresPerTask=cpu=4,gres/gpu=1", "[--gpus-per-task=1]"),
        ("Reservation=mine", "[--reservation=mine]"),
        ("Reservation=(null)", None),
        ("ReqNodeList=node[1-2]", "[--nodelist=node[1-2]]"),
        ("StdErr=/x StdOut=/data/My Project/slurm-7.out Power=", "[--output=/data/My Project/slurm-7.out]"),
    ],
)
def test_a_successor_asks_for_what_this_job_has(node: Node, shown: str, asked: str | None) -> None:
    node.shows(shown)
    node.can_requeue(False)
    node.script("srun", "exit 143")  # stopped while it started
    node.start()
    (call,) = node.calls("sbatch")
    if asked is None:
        assert "--reservation" not in call
    else:
        assert asked in call
    assert call.endswith(f"[{PROJECT}/slurm/train.sbatch][{CONFIG}]")


@pytest.mark.parametrize(
    ("gpus", "cores", "nodes", "option"),
    [
        ("4", "1(x2)", "CPUTot=64 Gres=gpu:4", "--cpus-per-task=64"),
        ("4", "1(x2)", "CPUEfctv=62 CPUTot=64 Gres=gpu:a100:8(S:0-1)", "--cpus-per-task=28"),
        ("2", "64,7", "CPUTot=32 Gres=gpu:4", "--cpus-per-task=16"),
        ("2", "1(x2)", "", "--cpus-per-task=8"),  # scontrol says nothing of nodes
    ],
)
def test_gpus_that_starve_are_told_with_the_option_to_add(
    node: Node, gpus: str, cores: str, nodes: str, option: str
) -> None:
    node.knows_nodes(nodes)
    said = node.start(SLURM_JOB_CPUS_PER_NODE=cores, SLURM_GPUS_ON_NODE=gpus).stderr
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert option in warning.split()
    assert len(node.calls("srun")) == 1, "it trains all the same"


@pytest.mark.parametrize(
    ("gpus", "cores"),
    [("4", "16(x2)"), ("0", "1(x2)"), ("4", "8(x2)")],
    ids=["four a rank", "no GPUs", "all that the node has"],
)
def test_nothing_is_told_where_there_is_nothing_to_add(node: Node, gpus: str, cores: str) -> None:
    node.knows_nodes("CPUTot=8 Gres=gpu:4")
    assert "warning" not in node.start(SLURM_JOB_CPUS_PER_NODE=cores, SLURM_GPUS_ON_NODE=gpus).stderr


def test_srun_waits_as_long_as_the_config_says(node: Node) -> None:
    node.script("python", f'exec {sys.executable} "$@"')
    node.start()
    (call,) = node.calls("srun")
    (wait,) = re.findall(r"\[--wait=(\d+)\]", call)
    assert int(wait) > 150


def test_a_python_without_torch_is_refused_in_one_line(node: Node) -> None:
    hidden = node.root / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    node.script("python", f'PYTHONPATH={hidden}:{PROJECT} exec {sys.executable} "$@"')
    started = node.start()
    assert started.returncode == 78
    (line,) = started.stderr.splitlines()
    assert "torch" in line
    assert (node.calls("srun"), node.requeues()) == ([], [])


def test_a_node_that_has_lost_torch_is_left(node: Node) -> None:
    node.python(f"echo {node.run}; echo torch=no")
    assert node.start(restart=2).returncode != 0
    assert node.requeues() == ["[requeue][7]"]
    assert not node.calls("srun")

"""What the user asks of a cluster: the options of `up`."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LocalClusterError

MODES = ("auto", "netns", "ports")
PROCESS_TRACKERS = ("auto", "proctrack/cgroup", "proctrack/linuxproc")


@dataclass(frozen=True)
class Options:
    """The options of `up` and their defaults; a cluster that is up knows what "auto" became.

    Attributes:
        nodes: how many, 1 to 64.
        cpus: per node, as SLURM sees it, 1 to 64; may exceed the machine's.
        gpus: fake GPUs per node.
        memory: MiB per node, as SLURM sees it.
        mode: "netns" (every node in namespaces of its own), "ports" (every slurmd on a port of its own), or "auto".
        dbd: whether slurmdbd and mariadb run, so that sacct works.
        grace: GraceTime of the partition low, seconds.
        kill_wait: seconds from SIGTERM to SIGKILL at a job's time limit or at scancel.
        slurmd_timeout: seconds until a silent node is DOWN; message_timeout adds to it.
        message_timeout: seconds that one daemon waits for another's answer.
        requeue_delay: seconds before a requeued job may start again, at least 5.
        preempt_user_signal: whether preemption sends the signal of the job's --signal.
        proctrack: SLURM's plugin that finds a job's processes, or "auto".
        debug: level of SLURM's logs.
        keep_failed: whether a cluster that did not come up is left for inspection.
    """

    nodes: int = 4
    cpus: int = 4
    gpus: int = 2
    memory: int = 16000
    mode: str = "auto"
    dbd: bool = False
    grace: int = 10
    kill_wait: int = 5
    slurmd_timeout: int = 10
    message_timeout: int = 5
    requeue_delay: int = 5
    preempt_user_signal: bool = False
    proctrack: str = "auto"
    debug: str = "info"
    keep_failed: bool = False

    def check(self) -> None:
        """See that the numbers are possible.

        Raises:
            LocalClusterError: one is not; the message says what is.
        """
        for name, count in (("nodes", self.nodes), ("cpus", self.cpus)):
            if not 1 <= count <= 64:
                raise LocalClusterError(f"--{name} {count}: valid are 1 to 64")
        if self.requeue_delay < 5:
            raise LocalClusterError(
                f"--requeue-delay {self.requeue_delay}: SLURM takes less than 5 for its default of 120"
            )

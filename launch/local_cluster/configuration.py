"""The files that SLURM's daemons read, and env.sh, which a user's shell reads."""

from __future__ import annotations

import os
import socket
import stat

from .description import Description
from .hosts import write_hosts


def write_configuration(description: Description) -> None:
    """Write all configuration files into the state directory, and the nodes' names where they are looked up."""
    state = description.state
    description.slurm_conf.write_text(slurm_conf(description))
    (state / "gres.conf").write_text(_gres_conf(description))
    (state / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={state}/cgroup\nCgroupAutomount=no\n")
    write_hosts(description)
    if description.options.dbd:
        path = state / "slurmdbd.conf"
        path.write_text(_slurmdbd_conf(description))
        path.chmod(0o600)  # slurmdbd refuses it otherwise
    (state / "env.sh").write_text(f"export SLURM_CONF={description.slurm_conf}\n")


def slurm_conf(description: Description) -> str:
    """The whole text of slurm.conf."""
    return "".join(
        section(description) for section in (_daemons, _jobs_and_preemption, _times, _accounting, _nodes, _partitions)
    )


def _daemons(description: Description) -> str:
    state, options = description.state, description.options
    return f"""\
ClusterName=local
SlurmctldHost={socket.gethostname()}({description.host_address})
SlurmctldPort={description.controller_port}
SlurmdPort={description.slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the delay before a requeued job may start again (default 120 s).
AuthInfo=socket={description.munge_socket},cred_expire={options.requeue_delay}
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/spool/%n.pid
SlurmctldLogFile={description.log("slurmctld.log")}
SlurmdLogFile={description.log("%n.log")}
SlurmctldDebug={options.debug}
SlurmdDebug={options.debug}
MailProg=/bin/true
MpiDefault=none
ProctrackType={options.proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
PropagateResourceLimits=NONE
"""


def _jobs_and_preemption(description: Description) -> str:
    signal = "SlurmctldParameters=preempt_send_user_signal\n" if description.options.preempt_user_signal else ""
    return f"""\
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{signal}JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_resolution=1,sched_interval=1,batch_sched_delay=0
PriorityType=priority/basic
"""


def _times(description: Description) -> str:
    options = description.options
    return f"""\
KillWait={options.kill_wait}
SlurmctldTimeout=30
SlurmdTimeout={options.slurmd_timeout}
MessageTimeout={options.message_timeout}
TCPTimeout=2
UnkillableStepTimeout=60
BatchStartTimeout=10
InactiveLimit=0
Waittime=0
MinJobAge=3600
"""


def _accounting(description: Description) -> str:
    storage = "AccountingStorageType=accounting_storage/none\n"
    if description.options.dbd:
        storage = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={description.database_port}
AccountingStoragePass={description.munge_socket}
"""
    return f"JobCompType=jobcomp/filetxt\nJobCompLoc={description.state}/jobcomp.txt\n{storage}"


def _nodes(description: Description) -> str:
    options = description.options
    gpus = f" Gres=gpu:{options.gpus}" if options.gpus else ""
    shape = (
        f"CPUs={options.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={options.cpus} ThreadsPerCore=1 "
        f"RealMemory={options.memory}{gpus} State=UNKNOWN"
    )
    return "".join(
        f"NodeName={name} NodeHostname={name if description.has_namespaces else socket.gethostname()} "
        f"NodeAddr={description.node_address(number)} Port={description.node_port(number)} {shape}\n"
        for name, number in description.nodes.items()
    )


def _partitions(description: Description) -> str:
    return f"""\
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={description.options.grace}
PartitionName=high PriorityTier=10 PreemptMode=OFF GraceTime=0
"""


def _gres_conf(description: Description) -> str:
    """Make the fake GPUs' device files and return the text that lists them.

    They are copies of /dev/null, named so that CUDA_VISIBLE_DEVICES becomes 0,1,... Where mknod is not allowed they
    are plain files: --gres=gpu:N still works, without that variable.
    """
    folder, count = description.state / "dev", description.options.gpus
    folder.mkdir(exist_ok=True)
    for index in range(count):
        path = folder / f"nvidia{index}"
        path.unlink(missing_ok=True)
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError:
            path.touch()
    lines = ["AutoDetect=off"]
    if count:
        indices = f"[0-{count - 1}]" if count > 1 else "0"
        lines += [
            f"NodeName={name} Name=gpu Flags=nvidia_gpu_env File={folder}/nvidia{indices}" for name in description.nodes
        ]
    return "\n".join(lines) + "\n"


def _slurmdbd_conf(description: Description) -> str:
    return f"""\
AuthType=auth/munge
AuthInfo=socket={description.munge_socket}
DbdHost=localhost
DbdPort={description.database_port}
SlurmUser=root
LogFile={description.log("slurmdbd.log")}
PidFile={description.state}/slurmdbd.pid
DebugLevel={description.options.debug}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""

"""The batch script of a job, but for what submitit writes: options, the lines around srun, how to submit again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_dist.parallel.environment import srun_wait_seconds
from launch.request import Request

ROOT = Path(__file__).resolve().parents[1]
LIFECYCLE = ROOT / "slurm" / "lifecycle.sh"
REQUEUE = ROOT / "slurm" / "requeue.sh"


def slurm_options(request: Request, runs: Sequence[Request], at_once: int) -> dict[str, Any]:
    """What is SLURM's own, by the names that submitit gives it."""
    wait = max(srun_wait_seconds(run.config.distributed.timeout_seconds) for run in runs)
    extra: dict[str, Any] = {"requeue": True, **{name: value or True for name, value in request.extra.items()}}
    if request.mem is not None:
        extra["mem"] = request.mem
    chosen = {name: getattr(request, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
    return {
        **{name: value for name, value in chosen.items() if value is not None},
        **({"gpus_per_node": request.gpus_as_asked} if request.gpus_per_node else {}),
        "signal_delay_s": request.signal_seconds,
        "array_parallelism": at_once,
        "setup": setup_lines(request, runs),
        "teardown": ['exec bash "$requeue" end "$run" "$?" bash -c "$again"'],
        "srun_args": [f"--cpus-per-task={request.cpus_per_task}", "--export=ALL", f"--wait={wait}"],
        "additional_parameters": extra,
    }


def setup_lines(request: Request, runs: Sequence[Request]) -> list[str]:
    """Lines of the batch script before srun: which run this is, and how it comes back."""
    total = request.total_minutes or 0
    again = [f"cd {shlex.quote(os.getcwd())} && {shlex.join(command_again(run))}" for run in runs]
    return [
        *request.setup,
        "set +e  # the exit code of srun is judged at the end",
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"source {shlex.quote(str(LIFECYCLE))}",
        f"requeue={shlex.quote(str(REQUEUE))}",
        f"runs=({shlex.join(str(run.config.directory.resolve()) for run in runs)})",
        "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
        f"agains=({shlex.join(again)})",
        "again=${agains[${SLURM_ARRAY_TASK_ID:-0}]}",
        f"export MAX_REQUEUES={request.max_requeues} TOTAL_MINUTES={total}",
        "export DDPM_EXIT_CODE_FILE=$(mktemp) OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
        "trap : INT HUP USR1 USR2  # the tasks stop at them; this shell waits for the tasks",
        """trap 'bash "$requeue" told "$run"' TERM""",
        "srun() {",
        '    command srun "$@" &',
        "    wait_through_signals $!",
        "}",
        'bash "$requeue" begin "$run" || exit',
    ]


def command_again(run: Request) -> list[str]:
    """The command that submits this one run again, for where SLURM does not requeue."""
    options = {
        "config": run.config_file and run.config_file.resolve(),
        "nodes": run.nodes,
        "gpus-per-node": run.gpus_as_asked,
        "tasks-per-node": run.tasks_per_node,
        "cpus-per-task": run.cpus_per_task,
        "mem": run.mem,
        "time": run.minutes,
        "total-time": run.total_minutes,
        "max-requeues": run.max_requeues,
        "signal-lead": run.signal_seconds,
        **{name: getattr(run, name) for name in ("partition", "account", "qos", "constraint", "exclude", "python")},
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    given += [f"--sbatch={name}={value}" if value else f"--sbatch={name}" for name, value in run.extra.items()]
    given += [f"--setup={line}" for line in run.setup]
    return [sys.executable, "-m", "launch.submit", *given, *run.overrides]

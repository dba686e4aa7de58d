"""submitit's executor for a request. Nothing else in this project touches what submitit keeps private."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_dist.errors import ConfigError
from launch.batch import slurm_options
from launch.request import Request
from launch.task import Task

if TYPE_CHECKING:
    from submitit import AutoExecutor


def private_folder(request: Request, *, make: bool) -> Path:
    """For submitit's pickles: a job runs what is in them, so nobody else may write there."""
    run = request.config.directory
    folder = run.parent.resolve() / ".submitit" / run.name
    if make:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            about = folder.stat()
        except OSError as error:
            raise ConfigError(f"run.root={run.parent}: cannot write {folder} ({error.strerror})") from None
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
            raise ConfigError(f"{folder}: others can write there, and jobs run what lies there; use another run.root")
    return folder


def build_executor(
    request: Request, runs: Sequence[Request], folder: Path, *, cluster: str, at_once: int
) -> AutoExecutor:
    """One job, or an array where there are several runs, of which at_once run at a time.

    Raises:
        ConfigError: submitit is not installed, or there is no such cluster here.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("submitit is not installed; pip install submitit (or `pip install -e '.[slurm]'`)") from None
    python = {"slurm_python": request.python} if cluster == "slurm" and request.python else {}
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster, **python)
    except RuntimeError:
        raise ConfigError(
            f"--cluster {cluster}: no srun here; run it on a machine that submits jobs (a login node), or give "
            "--cluster local for this machine"
        ) from None
    executor.update_parameters(
        name=request.config.run.name,
        nodes=request.nodes,
        tasks_per_node=request.tasks_per_node,
        cpus_per_task=request.cpus_per_task,
        stderr_to_stdout=True,
    )
    if request.gpus_per_node:
        executor.update_parameters(gpus_per_node=request.gpus_per_node)
    if cluster == "local":
        executor.update_parameters(timeout_min=request.minutes or 365 * 24 * 60)
    if cluster == "slurm":
        options = slurm_options(request, runs, at_once)
        executor.update_parameters(**{f"slurm_{name}": value for name, value in options.items()})
        # None: the partition's default, where submitit's is 5 minutes; and no key that accounting might not know.
        executor._executor.update_parameters(time=request.minutes, wckey=None)
    return executor


def submit(executor: AutoExecutor, tasks: Sequence[Task]) -> list[Any]:
    """Hand the tasks over to SLURM, or start them. Returns their jobs, one for each task.

    Raises:
        ConfigError: sbatch refuses them, for instance because there is no such partition; or it does not answer.
    """
    from submitit.core.utils import FailedJobError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        words = "; ".join(str(error).splitlines()) or "no reason given"
        raise ConfigError(f"nothing was submitted: {words}") from None
    print(said.getvalue(), end="", file=sys.stderr)
    return jobs


def sbatch_text(executor: AutoExecutor, num_runs: int) -> str:
    """Exactly what sbatch would be given."""
    from submitit import SlurmExecutor

    inner = executor._executor
    assert isinstance(inner, SlurmExecutor)
    if num_runs > 1:
        inner.parameters["map_count"] = num_runs
    return str(inner._make_submission_file_text(inner._submitit_command_str, "dry-run"))

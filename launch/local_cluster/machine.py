"""This machine: how to run its programs, and what it must have to carry a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .errors import LocalClusterError
from .options import Options

SYSTEM_FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSTALL = "apt-get install -y --no-install-recommends"
PACKAGES = {  # of Debian, by program
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "munge": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}


def find_system_programs() -> None:
    """Append the system's folders to PATH: an ordinary user's PATH often lacks those that hold the daemons."""
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:{SYSTEM_FOLDERS}"


def run(
    *argv: str | Path, check: bool = True, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with empty standard input.

    Args:
        argv: the program and its arguments.
        check: whether a failure is an error.
        environment: in place of ours.

    Returns:
        The finished process; `stdout` holds its standard output and error together.

    Raises:
        LocalClusterError: it failed, and `check` is true.
        FileNotFoundError: there is no such program.
    """
    words = [str(word) for word in argv]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if check and done.returncode:
        raise LocalClusterError(f"{' '.join(words)} -> {done.returncode}\n{done.stdout}")
    return done


def succeeds(*argv: str | Path) -> bool:
    """Whether the program runs and exits with 0."""
    return run(*argv, check=False).returncode == 0


def check_machine(options: Options) -> None:
    """See that the programs are there and that we are root.

    Raises:
        LocalClusterError: something is missing; the message says how to get it.
    """
    needed = ["slurmctld", "slurmd", "srun", "munged", "munge"]
    needed += ["ip", "nsenter"] if options.mode != "ports" else []
    needed += ["slurmdbd", "mariadbd"] if options.dbd else []
    missing = [program for program in needed if not shutil.which(program)]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[program] for program in missing))
        raise LocalClusterError(f"not installed: {', '.join(missing)}; as root: apt-get update && {INSTALL} {packages}")
    if os.geteuid():
        raise LocalClusterError("needs root (SLURM daemons, network namespaces); in a container you are root already")

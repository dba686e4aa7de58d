"""The commands for SLURM that the documents print, executed as printed on a cluster of two nodes with four GPUs each.

The GPUs are fake, so the ranks train on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, cluster_of
from documents import Entry, registry
from harness import wait_until
from scratch import copy_of, execute

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ENTRIES = [entry for entry in registry().values() if entry.slurm is not None]


@pytest.fixture(scope="module")
def cluster_with_gpus() -> Iterator[Cluster]:
    with cluster_of("--nodes", "2", "--cpus", "32", "--gpus", "4") as cluster:
        yield cluster


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.text.splitlines()[0])
def test_a_command_works_as_printed(entry: Entry, cluster_with_gpus: Cluster, checkout: Path, tmp_path: Path) -> None:
    folder = copy_of(checkout, tmp_path / "ddpm_dist", entry)
    slurm = {"SLURM_CONF": cluster_with_gpus.environment["SLURM_CONF"]}
    code, output = execute(folder, entry.filled(), extra=slurm)
    assert code == (entry.exit or 0), output
    for words in entry.slurm or ():
        assert re.search(words, output, re.MULTILINE), f"{words!r} is not in\n{output}"
    try:
        if entry.trains:
            status = folder / entry.trains / "status.json"
            wait_until(status.exists, lambda: f"no attempt has begun\n{logs(folder)}", timeout=240)
    finally:
        cluster_with_gpus.run("scancel", "--user=root", "--signal=KILL")
        cluster_with_gpus.run("scancel", "--user=root")


def logs(folder: Path) -> str:
    """What the job has written: sbatch's log, or submitit's."""
    return "\n".join(path.read_text(errors="replace") for path in [*folder.glob("*.out"), *folder.rglob("*_log.*")])

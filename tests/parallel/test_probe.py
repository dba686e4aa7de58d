"""What the doctor measures on real ranks: all-reduces, and whether they share the folder."""

from __future__ import annotations

import os
from pathlib import Path

from harness import Job

from ddpm_dist.parallel.probe import probe


def probe_one_folder(folder: Path) -> int:
    return probe(folder, "cpu", 30.0, 0.3)


def probe_folders_of_their_own(folder: Path) -> int:
    return probe_one_folder(folder / os.environ["RANK"])


def test_ranks_that_share_a_folder_are_fine_and_leave_nothing_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with Job(2, tmp_path / "log", probe_one_folder, (folder,)) as job:
        assert job.wait(60) == [0, 0], job.output()
    words = [line.split()[:2] for line in job.output().splitlines() if line.startswith(("ok ", "error "))]
    assert words == [["ok", "ranks"], *[["ok", "all-reduce"]] * 3, ["ok", "run.root"]], job.output()
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_another_one_on_each_rank_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with Job(2, tmp_path / "log", probe_folders_of_their_own, (tmp_path,)) as job:
        assert job.wait(60) == [78, 78], job.output()
    assert "is not shared: some rank does not see what rank 0 wrote" in job.output()

"""The rehearsal of docs/slurm.md, typed as the page prints it: a cluster, a sweep on it, a node that crashes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import why_no_slurm
from documents import ROOT, Entry, commands_in
from scratch import copy_of, execute

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]

# A job that lasts and one that preempts it, which take minutes: test_preemption_on_slurm.py does the same.
ELSEWHERE = ("--time 4:00:00", "--partition high", "runs/quickstart")
FIRST, LAST = "export LOCAL_SLURM_STATE=$(mktemp -d)", "slurm/local-cluster down"


def test_the_rehearsal_of_the_page_works_as_printed(checkout: Path, tmp_path: Path) -> None:
    if lack := why_no_slurm():
        pytest.skip(lack)
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    typed = [command.text for command in commands_in(page)]
    typed = typed[typed.index(FIRST) : typed.index(LAST) + 1]
    typed = [text for text in typed if not any(word in text for word in ELSEWHERE)]
    assert len(typed) == 10
    folder = copy_of(checkout, tmp_path / "ddpm_dist", Entry("the rehearsal"))
    end = f"trap '{LAST}' EXIT"  # also where a command fails
    code, output = execute(folder, "\n".join(["set -e", typed[0], end, *typed[1:]]), seconds=800)
    assert code == 0, output
    assert "Traceback" not in output
    for lr in ("1e-3", "2e-3"):
        for seed in (0, 1):
            run = f"runs/sweep-lr={lr}-seed={seed}"
            assert re.search(rf"^{run}: finished at step 40: target reached$", output, re.MULTILINE), output
            assert re.search(rf"^{run}: finished at step 40 of 40", output, re.MULTILINE), output
    assert re.search(r"^node2 +pid \d+ +alive", output, re.MULTILINE), "it crashed and came back"
    assert re.search(r"^down in ", output, re.MULTILINE), output

"""slurm/requeue.sh: what it decides from status.json, the exit code that rank 0 left, and what SLURM says of the job.

Here scontrol is a script; tests/slurm has the real one, and takes what it says from there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]


class Job:
    """One job and its restarts, of which only what SLURM would say of them is there."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"
        (root / "bin").mkdir()
        self.script(
            "scontrol", f'echo "$@" >>{root}/asked; [ "$1" = requeue ] && exit $(cat {root}/rc); cat {root}/job'
        )
        self.slurm(restarts=0)
        self.set_requeue(0)

    def script(self, name: str, body: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def slurm(self, state: str = "RUNNING", reason: str = "None", restarts: int = 0, preempted: str = "None") -> None:
        fields = f"JobId=7 JobState={state} Reason={reason} Requeue=1 Restarts={restarts} PreemptTime={preempted}"
        (self.root / "job").write_text(fields + "\n")

    def set_requeue(self, code: int) -> None:
        (self.root / "rc").write_text(str(code))

    def call(self, *argv: str, restart: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        environment |= {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "DDPM_EXIT_CODE_FILE": str(self.root / "code"), **variables}
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        script = PROJECT / "slurm" / "requeue.sh"
        return subprocess.run(["bash", str(script), *argv], env=environment, capture_output=True, text=True, timeout=60)

    def status(self, restart: int = 0, **values: object) -> None:
        self.run.mkdir(exist_ok=True)
        text = json.dumps({"slurm_job": "7", "slurm_restart": restart, "exit_code": None, **values}, indent=2)
        (self.run / "status.json").write_text(text + "\n")

    def attempt(self, launcher: int, restart: int = 0, **variables: str) -> tuple[int, str]:
        """A beginning and an end; returns (exit code, what was said)."""
        before = (self.run / "status.json").read_bytes() if (self.run / "status.json").exists() else None
        begun = self.call("begin", str(self.run), restart=restart, **variables)
        assert (begun.returncode, begun.stderr) == (0, "")
        assert before is None or (self.run / "status.json").read_bytes() == before
        return self.end(launcher, restart, **variables)

    def end(self, launcher: int, restart: int = 0, **variables: str) -> tuple[int, str]:
        successor = ("bash", "-c", f'echo "$DDPM_CHAIN ${{SLURM_JOB_ID:-}}" >>{self.root}/submitted')
        done = self.call("end", str(self.run), str(launcher), *successor, restart=restart, **variables)
        return done.returncode, done.stderr

    def requeued(self) -> int:
        asked = self.root / "asked"
        return asked.read_text().count("requeue 7") if asked.exists() else 0

    def submitted(self) -> str:
        path = self.root / "submitted"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("code", [65, 76, 78])
def test_what_cannot_work_stays_failed(job: Job, code: int) -> None:
    job.status(state="failed", exit_code=code, saved_step=3)
    assert job.attempt(1) == (code, f"slurm: job 7, restart 0: exit code {code}: stays failed\n")
    assert job.requeued() == 0


def test_a_refusal_before_there_was_a_run_is_read_from_rank_0(job: Job) -> None:
    (job.root / "code").write_text("78\n")
    assert job.attempt(1)[0] == 78
    assert job.requeued() == 0


def test_status_json_of_another_job_or_restart_says_nothing(job: Job) -> None:
    job.status(restart=3, state="failed", exit_code=78, saved_step=3)
    assert job.attempt(1)[0] == 1
    assert job.requeued() == 1


def test_finished_stays_finished_even_if_the_launcher_complains(job: Job) -> None:
    job.status(state="finished", exit_code=0, saved_step=30)
    assert job.attempt(1)[0] == 0
    assert job.requeued() == 0


def test_preempted_comes_back(job: Job) -> None:
    job.status(state="preempted", exit_code=75, saved_step=3)
    assert job.attempt(1)[0] == 75
    assert job.requeued() == 1
    assert job.submitted() == ""


@pytest.mark.parametrize(
    ("state", "reason", "preempted", "comes_back"),
    [
        ("COMPLETING", "None", "None", False),  # scancel
        ("COMPLETING", "TimeLimit", "None", True),
        ("COMPLETING", "None", "2026-11-23T18:42:25", True),  # PreemptMode=CANCEL
        ("RUNNING", "None", "2026-11-23T18:42:25", True),
        ("COMPLETING", "NodeDown", "None", True),  # where SLURM may not requeue it
        ("SIGNALING", "None", "None", True),  # --signal, before all nodes have said that it is delivered
    ],
)
def test_what_slurm_says_of_an_attempt_that_saved(
    job: Job, state: str, reason: str, preempted: str, comes_back: bool
) -> None:
    job.status(state="preempted", exit_code=75, saved_step=3)
    job.slurm(state, reason, 0, preempted)
    assert job.attempt(1)[0] == 75
    assert job.requeued() == comes_back


def test_at_the_time_limit_the_restart_is_ordered_before_this_one_has_ended(job: Job) -> None:
    job.call("begin", str(job.run))
    job.slurm("COMPLETING", "TimeLimit")
    job.call("told", str(job.run))
    assert job.requeued() == 1
    job.slurm("COMPLETING", "TimeLimit", restarts=1)
    job.status(state="preempted", exit_code=75, saved_step=3)
    assert job.end(1) == (75, "slurm: job 7, restart 0: SLURM has requeued it already\n")
    assert job.requeued() == 1


@pytest.mark.parametrize(("state", "reason"), [("RUNNING", "None"), ("COMPLETING", "None")])
def test_another_sigterm_orders_nothing_yet(job: Job, state: str, reason: str) -> None:
    """A preemption, a signal or a scancel: the end of the attempt decides."""
    job.call("begin", str(job.run))
    job.slurm(state, reason)
    assert job.call("told", str(job.run)).returncode == 0
    assert job.requeued() == 0


def test_an_attempt_that_slurm_has_replaced_decides_nothing(job: Job) -> None:
    job.status(state="preempted", exit_code=75, saved_step=3)
    job.slurm(restarts=1)
    assert job.attempt(1) == (75, "slurm: job 7, restart 0: SLURM has requeued it already\n")
    assert job.requeued() == 0


@pytest.mark.parametrize("launcher", [143, 140])
def test_killed_while_it_started_comes_back_without_counting(job: Job, launcher: int) -> None:
    for restart in range(5):
        job.slurm(restarts=restart)
        job.attempt(launcher, restart)
    assert job.requeued() == 5


def test_died_three_times_without_progress(job: Job) -> None:
    for restart in range(3):
        job.slurm(restarts=restart)
        code, said = job.attempt(1, restart)
        assert job.requeued() == min(restart + 1, 2)
    assert (code, "3 attempts in a row died and saved nothing new: stays failed" in said) == (70, True)


def test_progress_and_preemptions_between_deaths(job: Job) -> None:
    """An attempt that saved something begins the count anew; one that was only preempted neither counts nor forgets."""
    for restart, (begins_at, ends_at, code) in enumerate(
        [(0, 0, 70), (0, 5, 70), (5, 5, 70), (5, 5, 75), (5, 5, None), (5, 5, 70)]
    ):
        job.slurm(restarts=restart)
        job.status(restart=restart - 1, state="running", saved_step=begins_at)
        job.call("begin", str(job.run), restart=restart)
        job.status(restart=restart, state="running", saved_step=ends_at, exit_code=code)
        assert job.requeued() == restart
        returned, said = job.end(1, restart)
    assert job.requeued() == 5
    assert "stays failed" in said
    assert returned == 70


def test_preempted_twenty_times_without_a_step(job: Job) -> None:
    """A signal lead as long as the time limit would bring a job back for ever."""
    for restart in range(20):
        job.slurm(restarts=restart)
        job.status(restart=restart, state="preempted", exit_code=75, saved_step=3)
        said = job.attempt(1, restart)[1]
    assert job.requeued() == 19
    assert "20 attempts in a row saved nothing new" in said


def test_bounded_in_number(job: Job) -> None:
    for restart in range(3):
        job.slurm(restarts=restart)
        job.status(restart=restart, state="preempted", exit_code=75, saved_step=restart)
        said = job.attempt(1, restart, MAX_REQUEUES="2")[1]
    assert job.requeued() == 2
    assert "MAX_REQUEUES" in said


def test_bounded_in_time_with_attempts_that_left_no_end(job: Job) -> None:
    job.status(state="preempted", exit_code=75, saved_step=3)
    job.call("begin", str(job.run), TOTAL_MINUTES="1")
    log = job.run / "slurm.log"
    log.write_text(re.sub("time=[0-9]+", "time=1000", log.read_text()))  # it began in 1970
    (job.run / "attempts").mkdir()
    (job.run / "attempts" / "00001.json").write_text("{}")  # its last heartbeat is now
    job.slurm(restarts=1)
    refused = job.call("begin", str(job.run), restart=1, TOTAL_MINUTES="1")
    assert refused.returncode != 0
    assert "TOTAL_MINUTES" in refused.stderr
    job.status(restart=1, state="preempted", exit_code=75, saved_step=4)
    assert "TOTAL_MINUTES" in job.end(1, 1, TOTAL_MINUTES="1")[1]
    assert job.requeued() == 0


@pytest.mark.parametrize(("allowed", "began", "why"), [("2", 3, "MAX_REQUEUES"), ("100", 20, "20 attempts in a row")])
def test_restarts_that_slurm_orders_itself_are_bounded_too(job: Job, allowed: str, began: int, why: str) -> None:
    """A run that takes its node down at every start never gets as far as its end."""
    for restart in range(began):
        begun = job.call("begin", str(job.run), restart=restart, MAX_REQUEUES=allowed)
        assert (begun.returncode, begun.stderr) == (0, "")
    refused = job.call("begin", str(job.run), restart=began, MAX_REQUEUES=allowed)
    assert refused.returncode != 0
    assert why in refused.stderr


def test_restarts_that_slurm_orders_after_progress_go_on(job: Job) -> None:
    for restart in range(25):
        job.status(restart=restart - 1, state="running", saved_step=restart // 5)
        assert job.call("begin", str(job.run), restart=restart).returncode == 0


@pytest.mark.parametrize(("code", "attempts"), [(70, 3), (75, 20)])
def test_the_bounds_hold_where_the_log_cannot_be_written(job: Job, code: int, attempts: int) -> None:
    (job.run / "slurm.log").mkdir(parents=True)
    for restart in range(attempts):
        job.slurm(restarts=restart)
        job.status(restart=restart, state="failed", exit_code=code, saved_step=3)
        returned, said = job.attempt(1, restart)
    assert job.requeued() == attempts - 1
    assert returned == code
    assert "in a row" in said


@pytest.mark.parametrize(
    ("form", "shown"), [("standard", ""), ("relative", "Ystday 18:42"), ("%H:%M:%S", "18:42:25"), ("%A", "Monday")]
)
def test_preemption_is_seen_whatever_time_format_the_user_likes(job: Job, form: str, shown: str) -> None:
    time = f'$([ "$SLURM_TIME_FORMAT" = standard ] && echo 2026-11-23T18:42:25 || echo {shown})'
    fields = f"JobId=7 JobState=COMPLETING Reason=None Requeue=1 Restarts=0 PreemptTime={time}"
    job.script("scontrol", f'echo "$@" >>{job.root}/asked; [ "$1" = requeue ] || echo "{fields}"')
    job.status(state="preempted", exit_code=75, saved_step=3)
    assert job.attempt(1, SLURM_TIME_FORMAT=form)[0] == 75
    assert job.requeued() == 1


def test_a_successor_where_slurm_does_not_requeue(job: Job) -> None:
    job.set_requeue(1)
    job.status(state="preempted", exit_code=75, saved_step=3)
    assert job.attempt(1)[0] == 75
    assert job.submitted() == "7 \n", "it knows its chain, and has no variables of this job"


def test_the_bounds_hold_over_successors(job: Job) -> None:
    job.set_requeue(1)
    for number in range(3):
        job.status(state="preempted", exit_code=75, saved_step=number)
        chain: Any = {"DDPM_CHAIN": "7"} if number else {}
        job.attempt(1, MAX_REQUEUES="2", **chain)
    assert job.submitted() == "7 \n" * 2


@pytest.mark.slow
def test_it_waits_for_a_controller_that_is_away(job: Job) -> None:
    job.status(state="preempted", exit_code=75, saved_step=3)
    away = f'[ "$1" = show ] && [ ! -e {job.root}/back ] && {{ touch {job.root}/back; exit 1; }}'
    job.script("scontrol", f'{away}; echo "$@" >>{job.root}/asked; [ "$1" = requeue ] && exit 0; cat {job.root}/job')
    assert job.attempt(1)[0] == 75
    assert job.requeued() == 1


def test_an_array_is_requeued_task_by_task(job: Job) -> None:
    job.status(state="preempted", exit_code=75, saved_step=3)
    job.attempt(1, SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="1")
    assert "requeue 6_1" in (job.root / "asked").read_text()


def test_nothing_is_written_through_a_link_out_of_the_root(job: Job, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Such a run directory is refused by the trainer; until then nobody writes there."""
    outside = tmp_path_factory.mktemp("outside")
    job.run.symlink_to(outside)
    (job.root / "code").write_text("78\n")
    assert job.attempt(1)[0] == 78
    assert list(outside.iterdir()) == []


def test_a_run_directory_that_is_a_link_inside_the_root_is_counted_like_any_other(job: Job) -> None:
    (job.root / "run-v2").mkdir()
    job.run.symlink_to("run-v2")
    for restart in range(3):
        job.slurm(restarts=restart)
        said = job.attempt(1, restart)[1]
    assert job.requeued() == 2
    assert "3 attempts in a row died" in said


def test_a_job_that_began_under_an_earlier_version_goes_on_counting(job: Job) -> None:
    """Whose lines of slurm.log say life where later ones say restart."""
    for restart in range(25):
        job.status(restart=restart - 1, state="running", saved_step=restart)
        assert job.call("begin", str(job.run), restart=restart).returncode == 0
    log = job.run / "slurm.log"
    log.write_text(log.read_text().replace(" restart=", " life="))
    job.status(restart=24, state="preempted", exit_code=75, saved_step=30)
    job.slurm(restarts=24)
    assert job.end(1, 24) == (75, "slurm: job 7, restart 24: preempted: requeued\n")
    assert job.requeued() == 1


def test_attempts_of_an_earlier_submission_do_not_count(job: Job) -> None:
    """The same run, submitted anew: its slurm.log holds the lines of other jobs."""
    for restart in range(2):
        job.slurm(restarts=restart)
        assert job.attempt(1, restart)[0] == 1
    (job.root / "asked").unlink()
    for restart in range(2):
        job.slurm(restarts=restart)
        job.status(restart=restart, slurm_job="8", state="preempted", exit_code=75, saved_step=3)
        said = job.attempt(1, restart, SLURM_JOB_ID="8", MAX_REQUEUES="2")[1]
    assert (job.root / "asked").read_text().count("requeue 8") == 2, said

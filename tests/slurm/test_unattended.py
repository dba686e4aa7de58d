"""A job that reaches its time limit is restarted until the run is done; one that always crashes is tried three times.

These runs take minutes of waiting and little work, so they go on while the other tests of this folder run.
"""

from __future__ import annotations

import pytest
from harness import metrics
from submitted import SubmittedRun

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", ["lead", "limit"])
def test_the_time_limit_is_reached_twice(unattended: dict[str, SubmittedRun], name: str) -> None:
    run = unattended[name]
    run.wait_until(lambda: len(run.ends()) == 3, "the end of the third attempt", 800)
    # Without a lead SLURM kills the job after KillWait: the restart is ordered before the exit code is known.
    code = "75" if name == "lead" else "none"
    assert run.ends() == [(code, "again"), (code, "again"), ("75", "none")]
    assert {line["job"] for line in run.slurm_log()} == {run.job}
    reason = "stopped by SIGUSR2" if name == "lead" else "stopped by SIGTERM"
    assert [attempt["reason"] for attempt in run.attempts()[:2]] == [reason] * 2
    assert ("time limit reached: requeued" in run.output()) == (name == "limit")
    run.assert_no_step_twice(metrics(run.directory)[-1]["step"])


def test_a_training_that_always_crashes_is_tried_three_times(unattended: dict[str, SubmittedRun]) -> None:
    run = unattended["crashing"]
    fields = run.cluster.wait_for_end(run.job, run.log, 300)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "2")
    assert [end[1] for end in run.ends()] == ["again", "again", "none"]
    assert "3 attempts in a row died and saved nothing new: stays failed" in run.output()

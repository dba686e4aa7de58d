"""`python -m ddpm_dist.status` on real runs: killed, moved, resumed, damaged."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import call_train, call_unread, metrics, snapshot, start, train, wait_for_step

from ddpm_dist.status import duration, main

LONG = ("train.max_steps=100", "checkpoint.every=20", "distributed.timeout_seconds=5")


def call_train_on_a_node_of_its_own(argv: Sequence[str]) -> int:
    os.environ["SLURMD_NODENAME"] = f"node{os.environ.get('RANK', '0')}"
    return call_train(argv)


def call_train_dying_at_its_data(argv: Sequence[str]) -> int:
    from ddpm_dist.data import datasets

    module: Any = datasets
    module.load = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    return call_train_on_a_node_of_its_own(argv)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed on node0 and node1, then only its rank on node1, then finished on node0."""
    root = tmp_path_factory.mktemp("status")
    run, function = root / "run", call_train_on_a_node_of_its_own
    with start(2, root, *LONG, function=function) as job:
        wait_for_step(job, run, 25, attempt=1)
        said = show(run)
        assert said[0].startswith(f"{run}: running at step ")
        assert "  ETA 20" in "\n".join(said)
        job.kill()
    said = show(run)
    assert said[0].startswith(f"{run}: died at step ")
    assert said[0].endswith("0 is saved: a kill, a crash or a lost node")
    assert "more once it is resumed by the same command" in said[-1]
    with start(2, root, *LONG, function=function) as job:
        wait_for_step(job, run, 33, attempt=2)
        job.kill(1)
        assert job.wait(60) == [70, -9]
    return train(1, root, *LONG, function=function)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def show(*arguments: object, code: int = 0) -> list[str]:
    """The lines of the report."""

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(each) for each in arguments]) == code
    return out.getvalue().splitlines()


def facts(run: Path) -> dict[str, Any]:
    (only,) = json.loads("\n".join(show("--json", run)))
    return dict(only)


def test_attempts_say_on_which_nodes_and_where_a_rank_failed(finished: Path) -> None:
    found = [json.loads(path.read_text()) for path in sorted((finished / "attempts").glob("0*.json"))]
    assert [each["nodes"] for each in found] == [["node0", "node1"], ["node0", "node1"], ["node0"]]
    assert [each.get("failed_node") for each in found] == [None, "node1", None]


def test_steps_trained_again_are_those_lost(finished: Path) -> None:
    seen = [(record["step"], record["attempt"]) for record in metrics(finished)]
    last = dict(seen)  # the attempt whose line counts
    lost = [sum(1 for step, attempt in seen if attempt == number and last[step] != number) for number in (1, 2, 3)]
    attempts = facts(finished)["attempts"]
    assert [each["lost"] for each in attempts] == lost
    assert lost[0] > 0
    assert [each["how"] for each in attempts] == ["died", "failed", "finished"]
    assert attempts[1]["start_step"] == attempts[0]["saved_step"]
    assert all(each["start_step"] + each["lost"] <= each["reached"] for each in attempts)


def test_totals_add_up(finished: Path) -> None:
    said = facts(finished)
    assert (said["state"], said["step"], said["target"], said["steps_left"]) == ("finished", 100, 100, None)
    assert 0 < said["goodput"] < said["goodput"] + said["lost_share"] < 1
    assert said["seconds"] == pytest.approx(sum(each["seconds"] for each in said["attempts"]))


def test_the_report_names_the_node_on_which_attempts_die(finished: Path) -> None:
    before = snapshot(finished)
    text = show(finished)
    assert text[0] == f"{finished}: finished at step 100 of 100 (100.0%), step 100 is saved: target reached"
    assert [line.split()[0] for line in text[1:5]] == ["attempt", "1", "2", "3"]
    assert text[2].endswith("died: a kill, a crash or a lost node")
    assert "node0,node1" in text[2]
    assert text[3].endswith("silent: rank 1 (on node1)")
    assert text[-1] == "  node1: 2 of its 2 attempts died, 0 of 1 elsewhere; leave it out: --exclude=node1"
    assert snapshot(finished) == before, "nothing is written"


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("event=end code=75 next=again", "once SLURM starts the requeued job 7_1 again: "),
        ("event=end code=75 next=none", "once it is resumed by the same command: "),
        ("event=begin saved=20", "once it is resumed by the same command: "),
    ],
)
def test_a_job_that_was_requeued_is_what_resumes_the_run(run: Path, line: str, how: str) -> None:
    (run / "attempts" / "00003.json").unlink()
    (run / "status.json").write_text(json.dumps({"state": "preempted", "target": 100}))
    log = run / "slurm.log"
    log.write_text(f"time=5 job=7_1 event=begin\ntime={int(time.time())} chain=7_1 job=7_1 restart=0 {line}\n")
    assert any(how in text for text in show(run)), show(run)
    if line.endswith("again"):
        assert facts(run)["requeued_job"] == "7_1"
        log.write_text(f"time=5 job=7_1 restart=0 {line}\n")  # an attempt without SLURM has begun since
        assert any("the same command" in text for text in show(run))


def test_an_attempt_that_died_in_its_first_second_is_a_run_and_says_where(tmp_path: Path) -> None:
    with start(1, tmp_path, *LONG, function=call_train_dying_at_its_data) as job:
        assert job.wait(60) == [-9]
    assert not (tmp_path / "run" / "config.yaml").exists()
    (attempt,) = facts(tmp_path / "run")["attempts"]
    assert (attempt["how"], attempt["nodes"], attempt["lost"]) == ("died", ["node0"], 0)


def test_many_nodes_do_not_fill_the_screen(run: Path) -> None:
    path = run / "attempts" / "00001.json"
    nodes = [f"gpu{number:03d}" for number in range(0, 200, 3)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nodes": nodes}))
    assert "67 nodes from gpu000 on" in show(run)[2]
    assert facts(run)["attempts"][0]["nodes"] == nodes


def test_a_reader_that_has_seen_enough_is_no_error(finished: Path) -> None:
    done = call_unread([sys.executable, "-m", "ddpm_dist.status", str(finished)])
    assert (done.returncode, done.stderr) == (0, b"")


def test_where_there_is_no_run_one_line_says_so_and_the_others_are_shown(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    said = show(tmp_path / "none", tmp_path / "empty", finished, code=65)
    assert any(line.startswith(f"{finished}: finished") for line in said)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0] == f"error: {tmp_path / 'none'}: no such run directory"


def test_mistakes_on_the_command_line_get_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--none"]) == 78
    assert capsys.readouterr().err.startswith("error: command line: ")


def test_help_says_what_goodput_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "share of the wall time of all attempts that went into steps that counted" in capsys.readouterr().out


FILES = ("status.json", "config.yaml", "metrics.jsonl", "attempts/00001.json", "attempts/00003.json", "slurm.log")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"step": "x", "attempt": [], "nodes": 3}\n']
)
def test_damaged_files_cost_facts_and_no_traceback(run: Path, content: bytes) -> None:
    (run / "slurm.log").write_text(f"time={int(time.time())} job=7 event=end next=again\n")
    for name in FILES:
        whole = (run / name).read_bytes()
        (run / name).write_bytes(content)
        assert len(show(run)) > 4
        facts(run)
        (run / name).write_bytes(whole)
    for name in FILES:
        (run / name).write_bytes(content)
    show(run)


@pytest.mark.slow
def test_every_single_value_may_be_nonsense(run: Path) -> None:
    nonsense: tuple[Any, ...] = (None, -1, "x", [], {}, True, 1e300, 10**30)
    for name in ("status.json", "attempts/00002.json"):
        whole = json.loads((run / name).read_text())
        for key in whole:
            for value in nonsense:
                (run / name).write_text(json.dumps(whole | {key: value}))
                show(run)
        (run / name).write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59, "59.0 s"), (61, "1 min 01 s"), (3720, "1 h 02 min"), (2 * 86400 + 3 * 3600, "2 d 03 h")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text

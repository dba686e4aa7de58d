"""slurm/local-cluster without a SLURM: its command line, what it writes, and whom it ends."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launch.local_cluster import cluster
from launch.local_cluster.command import main
from launch.local_cluster.configuration import slurm_conf
from launch.local_cluster.description import Description, load
from launch.local_cluster.drill import Rehearsal
from launch.local_cluster.errors import LocalClusterError, RehearsalError
from launch.local_cluster.identity import Identity, choose_identity
from launch.local_cluster.options import Options
from launch.local_cluster.processes import RecordedProcesses, kill, start_time, wait_until, with_descendants

PROJECT = Path(__file__).parents[2]
COMMAND = PROJECT / "slurm" / "local-cluster"


def description(state: Path, **options: object) -> Description:
    return Description(state, replace(Options(mode="netns"), **options), Identity("ddabcdef", "198.18.7", 17000))  # type: ignore[arg-type]


def test_it_runs_anywhere_without_being_installed_and_without_any_package(tmp_path: Path) -> None:
    """-I and -S: no working directory, no PYTHONPATH and no site-packages on the path."""
    argv = [sys.executable, "-I", "-S", str(COMMAND), "--state", str(tmp_path / "none"), "status"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"no cluster is up in {(tmp_path / 'none').resolve()}\n"


def test_it_imports_the_standard_library_alone() -> None:
    """Inside functions too, where the test above does not come by."""
    imported = set()
    for path in (PROJECT / "launch" / "local_cluster").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module))
    assert "subprocess" in imported
    assert {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names} == set()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["up", "--nodes", "0"], "--nodes 0: valid are 1 to 64"),
        (["up", "--cpus", "65"], "--cpus 65: valid are 1 to 64"),
        (["up", "--requeue-delay", "4"], "--requeue-delay 4: SLURM takes less than 5 for its default of 120"),
        (["env"], "no cluster is up in {state} (LOCAL_SLURM_STATE or --state says where)"),
        (["crash", "node1"], "no cluster is up in {state} (LOCAL_SLURM_STATE or --state says where)"),
        (["drill", "none.yaml"], "no config file none.yaml"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    state = Path("/tmp/local-cluster-that-never-was")
    assert main(["--state", str(state), *argv]) == 1
    assert capsys.readouterr() == ("", f"local-cluster: error: {message.format(state=state)}\n")
    assert not state.exists()


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--state", str(tmp_path / ("x" * 80)), "up"]) == 1
    assert "set LOCAL_SLURM_STATE to a shorter path" in capsys.readouterr().err


def test_down_without_a_cluster_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--state", str(tmp_path), "down"]) == 0
    assert capsys.readouterr().out == f"no cluster is up in {tmp_path}\n"


def test_a_description_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = description(tmp_path, nodes=3, dbd=True)
    assert load(tmp_path) is None
    saved.save()
    assert load(tmp_path) == saved


def test_a_cluster_that_an_earlier_version_brought_up_can_still_be_read(tmp_path: Path) -> None:
    """Its options.json held the parsed command line too."""
    saved = description(tmp_path)
    saved.save()
    path = tmp_path / "options.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cmd": "up"}))
    assert load(tmp_path) == saved


def test_clusters_of_different_paths_do_not_meet() -> None:
    options = Options(nodes=1, mode="ports")
    first, second = (choose_identity(Path(f"/tmp/cluster-{name}"), options) for name in "ab")
    assert first == choose_identity(Path("/tmp/cluster-a"), options)
    assert first.prefix != second.prefix
    assert first.subnet != second.subnet
    assert first.port != second.port


@pytest.mark.parametrize(
    ("mode", "lines"),
    [
        ("netns", ["NodeName=node2 NodeHostname=node2 NodeAddr=198.18.7.2 Port=17001", "(198.18.7.254)"]),
        ("ports", ["NodeAddr=127.0.0.1 Port=17011", "NodeAddr=127.0.0.1 Port=17012", "(127.0.0.1)"]),
    ],
)
def test_every_node_has_an_address_and_port_of_its_own(tmp_path: Path, mode: str, lines: list[str]) -> None:
    text = slurm_conf(description(tmp_path, nodes=2, mode=mode))
    assert [line for line in lines if line not in text] == []
    assert text.count("\nNodeName=") == 2


def test_options_reach_slurm_conf(tmp_path: Path) -> None:
    text = slurm_conf(
        description(
            tmp_path,
            **{"cpus": 3, "gpus": 0, "memory": 77, "grace": 11, "kill_wait": 12, "slurmd_timeout": 13},
            **{"message_timeout": 14, "requeue_delay": 15, "preempt_user_signal": True, "debug": "debug2"},
            **{"dbd": True, "proctrack": "proctrack/linuxproc"},
        )
    )
    for part in (
        *("CPUs=3 ", "RealMemory=77 State", "GraceTime=11\n", "KillWait=12\n", "SlurmdTimeout=13\n"),
        *("MessageTimeout=14\n", "cred_expire=15\n", "preempt_send_user_signal\n", "SlurmdDebug=debug2\n"),
        *("AccountingStoragePort=17002\n", "ProctrackType=proctrack/linuxproc\n"),
    ):
        assert part in text
    assert "Gres=gpu" not in text
    assert "preempt_send_user_signal" not in slurm_conf(description(tmp_path))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[RecordedProcesses]:
    found = RecordedProcesses(tmp_path)
    yield found
    for name in found.names():
        found.kill(name)


def start(processes: RecordedProcesses, tmp_path: Path, *argv: str) -> int:
    processes.start("it", argv, tmp_path / "log")
    return processes.pid("it")


def test_a_process_is_known_by_pid_and_start_time(processes: RecordedProcesses, tmp_path: Path) -> None:
    """A pid that now belongs to somebody else is neither alive nor ended."""
    pid = start(processes, tmp_path, "sleep", "600")
    path = tmp_path / "procs.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({"it": {**recorded["it"], "start": recorded["it"]["start"] - 1}}))
    stranger = RecordedProcesses(tmp_path)
    assert not stranger.is_alive("it")
    stranger.end("it")
    assert start_time(pid) is not None
    assert processes.is_alive("it")


def test_a_process_that_ended_before_it_was_recorded_is_not_alive(tmp_path: Path) -> None:
    """So that `up` says at once that a daemon exited, where it would wait 30 s for it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "procs.json").write_text(json.dumps({"it": {"pid": ended.pid, "start": None}}))
    assert not RecordedProcesses(tmp_path).is_alive("it")


def test_ending_a_process_asks_first_and_then_insists(processes: RecordedProcesses, tmp_path: Path) -> None:
    asked, ready = tmp_path / "asked", tmp_path / "ready"
    stubborn = f"trap 'touch {asked}' TERM; touch {ready}; while :; do sleep 0.05; done"
    pid = start(processes, tmp_path, "bash", "-c", stubborn)
    wait_until("the trap", ready.exists, 10)
    processes.end("it", seconds=0.5)
    assert asked.exists()
    assert start_time(pid) is None
    assert processes.names() == RecordedProcesses(tmp_path).names() == []


def test_descendants_are_found(processes: RecordedProcesses, tmp_path: Path) -> None:
    pid = start(processes, tmp_path, "bash", "-c", "sleep 600 & wait")
    wait_until("a child", lambda: len(with_descendants(pid)) == 2, 10)
    for each in with_descendants(pid)[1:]:
        kill(each)


def test_a_crash_says_what_it_did_and_status_knows_of_it(
    tmp_path: Path, processes: RecordedProcesses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=""))
    description(tmp_path, mode="ports", nodes=2).save()
    for node in ("node1", "node2"):
        processes.start(node, ["sleep", "60"], tmp_path / "log")
    command = ["--state", str(tmp_path)]
    assert main([*command, "status"]) == 0
    capsys.readouterr()
    how = "SLURM notices within about 15 s; to start the node again: slurm/local-cluster restore"
    assert main([*command, "crash", "node2"]) == 0
    assert capsys.readouterr().out == f"node2 has crashed: no process of it is left; {how} node2\n"
    assert main([*command, "status"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(f"node1      pid {processes.pid('node1'):<7} alive\n")
    assert "node2      is down; to start it again: slurm/local-cluster restore node2\n" in shown
    assert main([*command, "crash-slurmd", "node1"]) == 0
    assert capsys.readouterr().out == f"slurmd of node1 is dead, its tasks run on; {how} node1\n"


def test_waiting_says_what_did_not_come() -> None:
    with pytest.raises(LocalClusterError, match=r"timed out after 0\.1s waiting for Godot"):
        wait_until("Godot", lambda: False, 0.1, 0.01)
    with pytest.raises(LocalClusterError, match="the daemon exited"):
        wait_until("the daemon", lambda: False, 60, is_alive=lambda: False)


class Journal:
    """What a run of the rehearsal leaves on disk."""

    def __init__(self, root: Path) -> None:
        self.run = root / "drill"
        self.run.mkdir()

    def train(self, attempt: int, steps: range) -> None:
        with (self.run / "slurm.log").open("a") as log:
            log.write(f"time={1000 * attempt} event=begin\n")
        with (self.run / "metrics.jsonl").open("a") as journal:
            for step in steps:
                journal.write(json.dumps({"attempt": attempt, "step": step, "time": 1000 * attempt + step}) + "\n")


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    monkeypatch.setattr("launch.local_cluster.drill.SETTLE_SECONDS", 0)
    return Rehearsal(tmp_path, {}, lambda node: None)


@pytest.mark.parametrize(("goes_on_at", "lost"), [(6, 0), (4, 2)])
def test_a_rehearsal_counts_the_steps_that_an_accident_cost(
    rehearsal: Rehearsal, tmp_path: Path, capsys: pytest.CaptureFixture[str], goes_on_at: int, lost: int
) -> None:
    journal = Journal(tmp_path)
    journal.train(1, range(1, 6))
    lightning = functools.partial(journal.train, 2, range(goes_on_at, 8))
    assert rehearsal.accident("struck by lightning", lightning, "7") is (lost == 0)
    row = capsys.readouterr().out
    assert row.startswith("struck by lightning ")
    assert row.split()[3:6] == ["5", str(goes_on_at), str(lost)]


def test_a_rehearsal_ends_with_the_job(rehearsal: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "_slurm", lambda *_: "FAILED\n")
    (tmp_path / "drill.out").write_text("error: no such key\n")
    with pytest.raises(RehearsalError, match=r"^drill: error: the job is FAILED; its log says:\nerror: no such key$"):
        rehearsal.wait_for_step("7")


class SlowStarter:
    """A job that needs longer for its first step than a time limit of a minute allows, and SLURM's answers about it.

    It begins anew and in vain each time that SLURM is asked, until it has a longer limit.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.attempt, self.limit = journal, 1, "1-0"
        journal.train(1, range(1, 6))

    def answer(self, *argv: str) -> str:
        if argv[0] == "scontrol":
            self.limit = argv[-1].removeprefix("timelimit=")
        elif self.limit == "1":
            self.attempt += 1
            self.journal.train(self.attempt, range(0))
            return "PENDING\n"
        elif self.attempt > 1:
            self.attempt += 1
            self.journal.train(self.attempt, range(6, 8))
        return "RUNNING\n"


def test_a_rehearsal_goes_on_after_a_time_limit_where_starting_takes_long(
    rehearsal: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = SlowStarter(Journal(tmp_path))
    monkeypatch.setattr("launch.local_cluster.drill.GIVE_UP_SECONDS", 2)
    monkeypatch.setattr(Rehearsal, "_slurm", lambda _, *argv: job.answer(*argv))
    assert rehearsal.accident("time limit", lambda: rehearsal._run_out_of_time("7"), "7")
    assert capsys.readouterr().out.split()[:5] == ["time", "limit", "5", "6", "0"]

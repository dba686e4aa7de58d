"""launch.submit without a cluster: the sbatch text, sweeps, refusals; and a real run by --cluster local."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from harness import TINY, call_unread, status

from launch.request import minutes_of
from launch.submit import from_arguments as request_from
from launch.submit import grid, main, parse

pytest.importorskip("submitit")

PROJECT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
QUICK = ("--config", "configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit only looks whether there is an srun."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(PROJECT)


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("1x1", ("--gpus-per-node=1", "--time=30")),
        ("1x4", ("--gpus-per-node=4", "--cpus-per-task=8", "--mem=64G", "--time=4:00:00", "--partition=gpu")),
        (
            "2x4",
            (
                *("--nodes=2", "--gpus-per-node=4", "--time=1-0", "--total-time=7-0", "--account=me", "--qos=long"),
                *("--constraint=a100", "--exclude=node3", "--sbatch=reservation=mine", "--setup=module load cuda"),
                "--python=apptainer exec --nv image.sif python",
            ),
        ),
        ("cpu", ("--nodes=2", "--tasks-per-node=4", "--signal-lead=300", "optim.lr=1e-4")),
        ("array", ("--gpus-per-node=1", "--sweep=optim.lr=1e-4,2e-4", "--sweep=run.seed=0,1", "--at-once=2")),
    ],
)
def test_the_text_that_sbatch_gets(capsys: pytest.CaptureFixture[str], name: str, argv: tuple[str, ...]) -> None:
    assert main([*QUICK, *argv, "--dry-run"]) == 0
    text = capsys.readouterr().out
    text = text.partition("\n# runs/quickstart")[0].rstrip() + "\n"
    text = text.replace(sys.executable, "<PYTHON>").replace(str(PROJECT), "<PROJECT>")
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("DDPM_WRITE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text()


def test_a_dry_run_that_nobody_reads_to_its_end_is_no_error(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "launch.submit", *QUICK, f"run.root={tmp_path}", "--nodes=1", "--dry-run"]
    done = call_unread(argv)
    assert (done.returncode, done.stderr) == (0, b"")


def test_dry_run_prints_the_resolved_config_and_touches_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*QUICK, f"run.root={tmp_path / 'runs'}", "optim.lr=3e-4", "--dry-run"]) == 0
    assert re.search(r"^  lr: 0.0003$", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_the_whole_grid_with_names_that_say_which() -> None:
    args = parse([*QUICK, "--sweep", "optim.lr=1e-4,2e-4", "--sweep", "model.dropout=0.1,0.2,0.3"])
    runs = grid(request_from(args), args.sweep)
    assert [run.config.run.name for run in runs] == [
        f"quickstart-lr={lr}-dropout={dropout}" for lr in ("1e-4", "2e-4") for dropout in ("0.1", "0.2", "0.3")
    ]
    assert (runs[4].config.optim.lr, runs[4].config.model.dropout) == (2e-4, 0.2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nodes=0"], ["--nodes 0", "at least 1"]),
        (["--gpus-per-node=2", "--tasks-per-node=4"], ["--tasks-per-node 4", "--gpus-per-node 2"]),
        (["--nodes=3"], ["3", "1, 2, 4, 8"]),
        (["--time=soon"], ["--time soon", "H:M:S"]),
        (["--time=0"], ["--time 0"]),
        (["--sbatch=nodes=4"], ["--sbatch nodes=4"]),
        (["--sbatch=-N4"], ["long options"]),
        (["--sweep=optim.lr"], ["--sweep optim.lr", "KEY=A,B"]),
        (["--sweep=optim.lr=1,2", "--sweep=optim.lr=3"], ["twice"]),
        (["--sweep=optim.learning=1,2"], ["optim.learning"]),
        (["--sweep=run.seed=1,1"], ["one name"]),
        (["--at-once=0"], ["--at-once 0"]),
        (["optim.lr=fast"], ["optim.lr", "fast"]),
        (["--partitoin=gpu"], ["--partitoin"]),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    assert main([*QUICK, *argv, "--dry-run"]) == 78
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words), error


def test_without_slurm_it_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*QUICK]) == 78
    assert 'Could not detect "srun"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("4:00:00", 240), ("0:30", 1), ("1-0", 1440), ("1-02:30", 1590), ("1-0:0:1", 1441), ("1:30:01", 91)],
)
def test_times_as_sbatch_takes_them(text: str, minutes: int) -> None:
    assert minutes_of("--time", text) == minutes


def test_local_trains_as_many_ranks_and_keeps_the_pickles_private(tmp_path: Path) -> None:
    keys = (*TINY, f"run.root={tmp_path}", "run.name=local", "train.max_steps=6", "optim.warmup_steps=2")
    argv = [sys.executable, "-m", "launch.submit", *QUICK, "--cluster=local", "--tasks-per-node=2", "--wait", *keys]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 6" in done.stdout
    assert status(tmp_path / "local")["world_size"] == 2
    folder = tmp_path / ".submitit" / "local"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.rglob("*.pkl"))


def test_debug_trains_in_this_very_process(tmp_path: Path) -> None:
    keys = (*TINY, f"run.root={tmp_path}", "run.name=debug", "train.max_steps=3", "optim.warmup_steps=2")
    code = (
        "import os, sys; from launch.submit import main; code = main(sys.argv[1:]); print(os.getpid()); sys.exit(code)"
    )
    argv = [sys.executable, "-c", code, *QUICK, "--cluster=debug", *keys]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(tmp_path / "debug")["pid"] == int(done.stdout.split()[-1])


def test_a_folder_of_somebody_else_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert main([*QUICK, "--cluster=local", f"run.root={tmp_path}"]) == 78
    assert "others can write there" in capsys.readouterr().err


def test_nothing_slow_is_imported() -> None:
    code = "import sys, launch.submit; sys.exit('torch' in sys.modules or 'submitit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, cwd=PROJECT).returncode == 0

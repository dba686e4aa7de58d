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

from launch.request import from_arguments as request_from
from launch.request import minutes_of
from launch.submit import main, parse
from launch.sweep import _as_name, _values, grid

pytest.importorskip("submitit")

PROJECT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
RECORDED = Path(__file__).parent / "recorded"
QUICK = ("--config", "configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit only looks whether there is an srun; here no scontrol answers, whatever this machine has."""
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", ""), ("scontrol", "exit 1\n")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
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


def dry_run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    """(the text that sbatch would get, what was said on stderr)."""
    assert main([*QUICK, *argv, "--dry-run"]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def scontrol_of(tmp_path: Path, *nodes: str) -> None:
    """A scontrol that knows two partitions, of which low is the default, and these nodes."""
    folder = tmp_path / "scontrol-says"
    folder.mkdir()
    for what in ("config", "partition"):
        (folder / what).write_text((RECORDED / f"{what}.txt").read_text())
    lines = [f"NodeName=n{number} {fields} State=IDLE" for number, fields in enumerate(nodes)]
    (folder / "node").write_text("\n".join(lines) + "\n")
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\ncat {folder}/"$2"\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)


@pytest.mark.parametrize(
    ("argv", "nodes", "cores"),
    [
        (["--gpus-per-node=4"], ["CPUTot=128 Gres=gpu:4 Partitions=low", "CPUTot=64 Gres=gpu:8 Partitions=low"], 8),
        (["--gpus-per-node=8"], ["CPUTot=16 Gres=gpu:4 Partitions=low", "CPUTot=96 Gres=gpu:8 Partitions=low"], 12),
        (["--gpus-per-node=1"], ["CPUTot=4 Gres=(null) Partitions=low", "CPUTot=30 Gres=gpu:4 Partitions=low"], 7),
        (["--gpus-per-node=2"], ["CPUEfctv=60 CPUTot=64 Gres=gpu:4 Partitions=low"], 15),
        (["--gpus-per-node=2", "--partition=high"], ["CPUTot=8 Gres=gpu:2 Partitions=low,high"], 4),
        (
            ["--gpus-per-node=2", "--partition=high"],
            ["CPUTot=2 Gres=gpu:2 Partitions=low", "CPUTot=8 Gres=gpu:2 Partitions=high"],
            4,
        ),
    ],
)
def test_a_gpu_job_asks_for_its_share_of_the_smallest_nodes_cores(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], nodes: list[str], cores: int
) -> None:
    scontrol_of(tmp_path, *nodes)
    text, said = dry_run(capsys, *argv)
    assert f"#SBATCH --cpus-per-task={cores}\n" in text
    assert set(re.findall(r"--cpus-per-task=(\d+)", text)) == {str(cores)}, "the step and a successor ask for as many"
    assert said == ""


def test_where_no_scontrol_answers_one_core_is_asked_for_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    text, said = dry_run(capsys, "--gpus-per-node=4")
    assert "#SBATCH --cpus-per-task=1\n" in text
    assert said.startswith("note: ")
    assert "--cpus-per-task" in said
    assert len(said.splitlines()) == 1


def test_cores_that_are_asked_for_win_and_cpu_jobs_ask_for_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scontrol_of(tmp_path, "CPUTot=64 Gres=gpu:4 Partitions=low")
    assert "#SBATCH --cpus-per-task=3\n" in dry_run(capsys, "--gpus-per-node=4", "--cpus-per-task=3")[0]
    assert "#SBATCH --cpus-per-task=1\n" in dry_run(capsys, "--tasks-per-node=4")[0]


def test_a_node_with_fewer_cores_than_gpus_gives_each_rank_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scontrol_of(tmp_path, "CPUTot=2 Gres=gpu:4 Partitions=low")
    assert "#SBATCH --cpus-per-task=1\n" in dry_run(capsys, "--gpus-per-node=1")[0]


@pytest.mark.parametrize("timeout", [120.0, 200.5, 900.0])
def test_srun_leaves_the_ranks_time_to_say_who_is_silent(capsys: pytest.CaptureFixture[str], timeout: float) -> None:
    from ddpm_dist.parallel import watchdog

    (wait,) = re.findall(r"--wait=(\d+) ", dry_run(capsys, f"distributed.timeout_seconds={timeout}")[0])
    asking = 3 * watchdog.BEAT_SECONDS + watchdog.STORE_SECONDS
    assert int(wait) > timeout + watchdog.GRACE_SECONDS + asking + watchdog.LAST_WORDS_SECONDS
    assert int(wait) > timeout + 30


def test_gpus_of_a_type_are_asked_for_as_sbatch_takes_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scontrol_of(tmp_path, "CPUTot=8 Gres=gpu:h100:4 Partitions=low", "CPUTot=64 Gres=gpu:a100:4 Partitions=low")
    text, said = dry_run(capsys, "--gpus-per-node=a100:4")
    assert "#SBATCH --gpus-per-node=a100:4\n" in text
    assert "#SBATCH --ntasks-per-node=4\n" in text
    assert "#SBATCH --cpus-per-task=16\n" in text
    assert "--gpus-per-node=a100:4 --tasks-per-node=4" in text, "a successor asks for the same"
    assert said == ""


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


def test_a_sweep_over_lists_is_parted_at_the_commas_between_them() -> None:
    assert _values("[64,128],[128, 256],x") == ["[64,128]", "[128, 256]", "x"]
    assert _as_name("block_out_channels=[128, 256]") == "block_out_channels=128_256"


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
        (["model.name=unit"], ["model.name=unit", "unet"]),
        (["--sweep=diffusion.schedule=linear,cosin"], ["diffusion.schedule=cosin", "linear"]),
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
    assert "no srun here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("4:00:00", 240), ("0:30", 1), ("1-0", 1440), ("1-02:30", 1590), ("1-0:0:1", 1441), ("1:30:01", 91)],
)
def test_times_as_sbatch_takes_them(text: str, minutes: int) -> None:
    assert minutes_of("--time", text) == minutes


@pytest.mark.slow
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


@pytest.mark.slow
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

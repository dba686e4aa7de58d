"""`--help` of every command: it comes at once, fits one screen, and names every exit code of the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES, MAX_COLUMNS = 40, 100
# Every exit code that a command ends with; slurm/train.sbatch and slurm/requeue.sh have no help.
EXIT_CODES = {
    "ddpm_dist.train": {0, 65, 70, 75, 76, 78},
    "ddpm_dist.sample": {0, 65, 70, 75, 76, 78, 130},
    "ddpm_dist.export": {0, 65, 70, 78, 130},
    "ddpm_dist.evaluate": {0, 65, 70, 78, 130},
    "ddpm_dist.status": {0, 65, 70, 78, 130},
    "ddpm_dist.sync": {0, 65, 70, 78, 130},
    "ddpm_dist.verify": {0, 1, 65, 70, 75, 76, 78, 130},
    "ddpm_dist.fetch": {0, 65, 78, 130},
    "launch.submit": {0, 65, 70, 75, 76, 78, 130},
    "launch.doctor": {0, 78, 130},
    "launch.torchrun": {0, 65, 70, 75, 76, 78, 130},
    "launch.local_cluster.command": {0, 1, 2, 128},
}
OF_A_SUBCOMMAND = [["up"], ["drill"], ["crash"]]
ASK_ALL = """
import contextlib, importlib, io, json, sys
answers = {}
for name, *words in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            code = module.main([*words, "--help"])
        except SystemExit as end:
            code = end.code
    answers[" ".join([name, *words])] = [code, output.getvalue(), "torch" in sys.modules]
print(json.dumps(answers))
"""


def ask_all() -> dict[str, tuple[int, str, bool]]:
    """{command: (exit code, help, whether torch is imported by then)}; one process asks all commands."""
    asked = [[name] for name in EXIT_CODES if name != "launch.torchrun"]
    asked += [["launch.local_cluster.command", *words] for words in OF_A_SUBCOMMAND]
    asked.append(["launch.torchrun", "2", "launch/torchrun.sh"])
    environment = os.environ | {"COLUMNS": str(MAX_COLUMNS), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", ASK_ALL, json.dumps(asked)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return {name.removesuffix(" 2 launch/torchrun.sh"): tuple(found) for name, found in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, bool]]:
    return ask_all()


COMMANDS = [*EXIT_CODES, *(f"launch.local_cluster.command {' '.join(words)}" for words in OF_A_SUBCOMMAND)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_torch_and_fits_one_screen(command: str, answers: dict[str, tuple[int, str, bool]]) -> None:
    code, text, took_torch = answers[command]
    assert code == 0
    assert not took_torch, "or an earlier command of this list has imported it"
    lines = text.splitlines()
    assert text.startswith("usage: ")
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= MAX_COLUMNS


@pytest.mark.parametrize("command", EXIT_CODES)
def test_help_has_an_example_and_names_every_exit_code(command: str, answers: dict[str, tuple[int, str, bool]]) -> None:
    _, text, _ = answers[command]
    assert re.search(r"^    (python -m|launch/|slurm/)\S* ?\S+", text, re.MULTILINE), "no example"
    _, _, table = text.partition("exit codes:\n")
    without_meanings = re.sub(r"^( *\d+  ).*", r"\1", table, flags=re.MULTILINE)
    assert {int(number) for number in re.findall(r"\b\d+\b", without_meanings)} == EXIT_CODES[command]


def test_the_start_script_shows_its_help_once_and_starts_no_ranks(answers: dict[str, tuple[int, str, bool]]) -> None:
    argv = [str(ROOT / "launch" / "torchrun.sh"), "--help"]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "2"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, answers["launch.torchrun"][1], "")

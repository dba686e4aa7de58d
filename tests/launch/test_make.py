"""What `make` installs, and when. Python and pip are stand-ins that write down how they are called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")

PYTHON = """#!/bin/sh
case $1 in
    -c) exec {python} "$@" ;;
    -m) mkdir -p "$3/bin" && cp fake-pip "$3/bin/pip" ;;
esac
"""
PIP = """#!/bin/sh
echo "$*" >> pip-calls
test ! -e pip-fails
"""
OLD_PYTHON = "#!/bin/sh\nexit 0\n"  # as the answer of a Python that is too old: nothing
TRAIN = '#!/bin/sh\necho "$DDPM_COMMAND: $PYTHON $*"\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with our Makefile, in which nothing is installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "launch").mkdir()
    python = shutil.which("python3") or "python3"
    scripts = {"python": PYTHON.format(python=python), "fake-pip": PIP, "old-python": OLD_PYTHON}
    for name, text in {**scripts, "launch/torchrun.sh": TRAIN}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str, python: str = "./python") -> subprocess.CompletedProcess[str]:
    """Run make there; variables of a make that runs these tests are not handed on."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
    argv = ["make", "--silent", f"PYTHON={python}", *arguments]
    return subprocess.run(argv, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


def installed(checkout: Path) -> list[str]:
    """The extras of each installation, in order."""
    calls = checkout / "pip-calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line.rpartition("--editable ")[2] for line in lines]


def test_train_installs_no_more_than_it_needs_and_only_once(checkout: Path) -> None:
    for _ in range(2):
        done = make(checkout, "train", "ARGS=train.max_steps=7 run.name=a")
        assert done.returncode == 0, done.stderr
        assert installed(checkout) == [".[quickstart]"]
    assert done.stdout.splitlines() == [
        "make train ARGS='train.max_steps=7 run.name=a': .venv/bin/python "
        "--config configs/quickstart.yaml train.max_steps=7 run.name=a"
    ]
    assert make(checkout, "train").stdout.startswith("make train: ")


def test_install_brings_the_tools_of_the_tests_too_and_only_once(checkout: Path) -> None:
    for _ in range(2):
        assert make(checkout, "install").returncode == 0
        assert installed(checkout) == [".[quickstart]", ".[quickstart,slurm,test]"]
    assert make(checkout, "train").returncode == 0
    assert len(installed(checkout)) == 2


def test_an_installation_that_failed_is_done_again(checkout: Path) -> None:
    (checkout / "pip-fails").touch()
    assert make(checkout, "train").returncode != 0
    assert make(checkout, "train").returncode != 0
    (checkout / "pip-fails").unlink()
    assert make(checkout, "train").returncode == 0
    assert installed(checkout) == [".[quickstart]"] * 3


@pytest.mark.parametrize("python", ["./old-python", "no-such-python"])
def test_a_python_that_will_not_do_is_refused_in_one_line(checkout: Path, python: str) -> None:
    done = make(checkout, "train", python=python)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"`{python}` is not Python 3.11 or newer" in line
    assert not (checkout / ".venv").exists()

"""Commands are printed as the person who reads them can type them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ddpm_dist.command import as_typed


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment that this Python says it belongs to, not on the PATH."""
    folder = tmp_path / "my project" / ".venv" / "bin"
    folder.mkdir(parents=True)
    for program in ("python", "mlflow"):
        (folder / program).symlink_to("/bin/true")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return folder


def test_a_program_that_the_shell_finds_is_called_by_its_name(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(environment), "/usr/bin"]))
    assert as_typed("mlflow") == "mlflow"


def test_a_program_of_another_environment_on_the_path_is_not_meant(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "python").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(other))
    monkeypatch.chdir(environment.parents[1])
    assert as_typed("python") == ".venv/bin/python"


def test_a_path_elsewhere_is_whole_and_quoted(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    environment.parents[1].rename(environment.parents[2] / "a b")  # below "/", so without the first slash
    assert as_typed("python") == "python", "it is not there any more"
    monkeypatch.setattr(sys, "executable", str(environment.parents[2] / "a b/.venv/bin/python"))
    monkeypatch.chdir(Path.home() if environment.is_relative_to("/tmp") else "/tmp")
    assert as_typed("python") == f"'{environment.parents[2]}/a b/.venv/bin/python'"


def test_a_program_that_this_environment_has_not_is_called_by_its_name(environment: Path) -> None:
    assert as_typed("tensorboard") == "tensorboard"

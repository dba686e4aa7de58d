"""The address of a server may not bring its password into the files of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_dist.config import load_config, to_yaml
from ddpm_dist.errors import ConfigError
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.address import refuse_password

WITH_PASSWORD = "https://me:secret@server:5000/mlflow"


def refuse(directory: RunDirectory, uri: str) -> None:
    refuse_password(load_config(None, [f"tracking.uri={uri}"]), directory)


@pytest.mark.parametrize("uri", ["null", "http://server:5000", "http://me@server", "postgresql://me:secret@server/db"])
def test_other_addresses_are_taken(tmp_path: Path, uri: str) -> None:
    refuse(RunDirectory(tmp_path / "run"), uri)


def test_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri=https://server:5000/mlflow and set") as caught:
        refuse(RunDirectory(tmp_path / "run"), WITH_PASSWORD)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_begun_with_it_goes_on_and_takes_no_other(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.config_file.write_text(to_yaml(load_config(None, [f"tracking.uri={WITH_PASSWORD}"])))
    refuse(directory, WITH_PASSWORD)
    with pytest.raises(ConfigError, match="a password in it"):
        refuse(directory, WITH_PASSWORD.replace("secret", "another"))

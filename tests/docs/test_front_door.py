"""What a visitor sees first is short, and says the same as the package: README, licence, citation."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

import ddpm_dist

ROOT = Path(__file__).parents[2]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_the_citation_names_this_version_and_this_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == ddpm_dist.__version__
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert citation["title"] == project["name"]


def test_the_licence_is_whole_and_names_its_owners() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License\n                           Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 The ddpm_dist authors" in text
    assert "[name of copyright owner]" not in text

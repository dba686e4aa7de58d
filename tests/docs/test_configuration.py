"""docs/configuration.md tells what the code does, and every config that a document shows is one that the code takes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import configuration  # noqa: E402

from ddpm_dist.build import TABLES, check_names  # noqa: E402
from ddpm_dist.config import Config, keys, load_config  # noqa: E402
from ddpm_dist.errors import ConfigError  # noqa: E402


def test_the_page_is_what_the_generator_makes() -> None:
    text = configuration.PAGE.read_text(encoding="utf-8")
    assert text == configuration.page(text), "docs/configuration.md is not up to date: run `make docs` and commit it"


def test_the_page_has_a_row_for_every_key_and_every_name_in_a_table() -> None:
    _, _, tables = configuration.PAGE.read_text(encoding="utf-8").partition(configuration.MARK)
    rows = [[cell.strip() for cell in line.split(" | ")] for line in tables.splitlines() if line.startswith("| `")]
    assert [row[0].strip("|` ") for row in rows] == list(keys())
    for row in rows:
        for name in TABLES.get(row[0].strip("|` "), ()):
            assert f"`{name}`" in row[2]


def test_a_page_without_its_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="nobody knows where the tables begin"):
        configuration.page("# Configuration\n")


@pytest.mark.parametrize("name", keys())
def test_the_default_and_the_bounds_on_the_page_are_those_of_the_reader(name: str) -> None:
    item = keys()[name]
    assert load_config(None, [f"{name}={configuration.as_yaml(item.field.default)}"]) == Config()
    for words, bound in re.findall(r"(of at least|above|below) (\S+)", configuration.bounds(item)):
        beyond = float(bound) - 1 if words == "of at least" else float(bound)
        with pytest.raises(ConfigError, match=f"{words} {bound}"):
            load_config(None, [f"{name}={beyond:g}"])


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_config_of_the_project_is_valid(file: Path) -> None:
    check_names(load_config(file))

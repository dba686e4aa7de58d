"""docs/configuration.md tells what the code does, and every config that a document shows is one that the code takes."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, commands_in, configs_in_documents, registry, split

sys.path.insert(0, str(ROOT / "docs"))

import configuration

from ddpm_dist.build import TABLES, check_names
from ddpm_dist.config import Config, keys, load_config
from ddpm_dist.config.flat import is_list
from ddpm_dist.errors import ConfigError, ExitCode


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
            load_config(None, [f"{name}=[{beyond:g}]" if is_list(name) else f"{name}={beyond:g}"])


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_config_of_the_project_is_valid(file: Path) -> None:
    check_names(load_config(file))


# What the documents show


@pytest.mark.parametrize(("place", "shown"), configs_in_documents().items(), ids=lambda value: str(value)[:40])
def test_every_yaml_block_of_a_document_is_a_config(place: str, shown: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(shown[1], encoding="utf-8")
    check_names(load_config(file))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_override_of_a_document_has_a_value_that_its_key_takes(document: Path) -> None:
    blocks, prose = split(document.read_text(encoding="utf-8"))
    code = [*(line for block in blocks for line in block.lines), *re.findall(r"`([^`]+)`", prose)]
    for word in (word for line in code for word in re.split(r"[\s()\[\]'\"]+", line)):
        name, equals, value = word.rstrip(".,;:").partition("=")
        if name in keys() and equals and not re.fullmatch(r"[A-Z_]*|.*\.\.\..*|.*\$.*", value):
            assert list(refused(name, value)) == [], f"in {document.name}"


def refused(name: str, values: str) -> Iterator[str]:
    """What the reader says of each of several values, as in `optim.lr=1e-4,2e-4` or `elastic.mode=stream|bitwise`."""
    for value in re.split(r"[,|]", values):
        try:
            load_config(None, [f"{name}={value}"])
        except ConfigError as error:
            if f"{name}={value}: expected" in str(error):  # other messages are about several keys together
                yield str(error)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_has_a_valid_config(document: Path, tmp_path: Path) -> None:
    mistakes = {text for text, entry in registry().items() if entry.exit == ExitCode.CONFIG}
    text = document.read_text(encoding="utf-8")
    # Names that a page itself adds to a table. tests/docs/test_worked_examples.py executes the commands that use them.
    added = set(re.findall(r"^[A-Z]+\[\"([\w-]+)\"\] = ", text, re.MULTILINE))
    for command in commands_in(text, document.name):
        if command.text in mistakes or command.has_blanks or added & set(re.split(r"[\s=]", command.text)):
            continue
        words = [word for line in command.text.splitlines() for word in shlex.split(line, comments=True)]
        words = [part for word in words for part in (word[5:].split() if word.startswith("ARGS=") else [word])]
        overrides = [word for word in words if word.partition("=")[0] in keys()]
        files = [after for word, after in pairwise(words) if word == "--config" or word.endswith("train.sbatch")]
        file = config_file(files[0], tmp_path) if files else None
        for values in itertools.product(*(in_turn(words, word) for word in overrides)):
            try:
                check_names(load_config(file, values))
            except ConfigError as error:
                pytest.fail(f"{command.place}: {command.text}: {error}")


def in_turn(words: list[str], override: str) -> list[str]:
    """The override, or each value of a sweep over it."""
    name, _, values = override.partition("=")
    sweep = "--sweep" in words and words[words.index(override) - 1] == "--sweep"
    return [f"{name}={value}" for value in values.split(",")] if sweep else [override]


def config_file(name: str, tmp_path: Path) -> Path | None:
    """The config of this name: in the checkout, in a document, or of a run that the reader has."""
    for file, text in configs_in_documents().values():
        if file == name:
            (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
            return tmp_path / "config.yaml"
    return None if name.startswith("runs/") else ROOT / name

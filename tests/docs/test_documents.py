"""What the documents name is there: files, links and their headings, make targets, modules, config keys, exit codes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from documents import DOCUMENTS, ROOT, commands_in, configs_in_documents, split
from PIL import Image

from ddpm_dist.config import keys, load_config
from ddpm_dist.data.datasets import load
from ddpm_dist.errors import ExitCode
from ddpm_dist.evaluation.pictures import save_curves, save_grid

CODE = "ddpm_dist", "launch", "slurm", "benchmarks", "tests", "configs", "docs"
# Of a run directory, or of the reader: these are no files of the project.
ELSEWHERE = {"config.yaml", "curves.png", "grid.png", "grid-ddpm.png", "pictures.yaml", "runs/mnist/config.yaml"}
OPTIONS_OF_OTHERS = {"--shm-size", "--allowed-hosts"}  # of docker, and of mlflow server
CODE_FILES = {".py", ".sh", ".sbatch", ".toml"}
SUFFIXES = {".py", ".sh", ".sbatch", ".yaml", ".toml", ".md", ".png", ".txt"}


def code_blocks(text: str) -> str:
    """The lines of all blocks of code."""
    return "\n".join(line for block in split(text)[0] for line in block.lines)


def without_blocks(text: str) -> str:
    return split(text)[1]


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", without_blocks(text))


def words_of_code(text: str) -> list[str]:
    """All that stands in backticks or in a block of code, word by word, without brackets and punctuation."""
    return words_of(" ".join([*in_backticks(text), code_blocks(text)]))


def words_of(code: str) -> list[str]:
    return [word.strip("()[],:;'\"") for word in code.split()]


def looks_like_ours(word: str) -> bool:
    """Whether a word is the name of a file, or a path below one of the project's folders."""
    is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) is not None
    is_below = "/" in word and word.partition("/")[0] in CODE
    of_the_reader = word in ELSEWHERE or word in {file for file, _ in configs_in_documents().values()}
    return is_path and (is_below or Path(word).suffix in SUFFIXES) and not of_the_reader


def missing_files(text: str) -> Iterator[str]:
    """Files that are neither in the checkout, nor in the package, nor in a folder that their line names before them."""
    for line in [*without_blocks(text).splitlines(), *(f"`{line}`" for line in code_blocks(text).splitlines())]:
        folders = [ROOT, ROOT / "ddpm_dist"]
        for word in words_of(" ".join(in_backticks(line))):
            if looks_like_ours(word) and not any((folder / word).exists() for folder in folders):
                yield word
            if word.endswith("/"):
                folders.append(ROOT / "ddpm_dist" / word)


def dead_links(text: str, folder: Path = ROOT) -> Iterator[str]:
    """Relative links whose file, or whose heading in that file, is not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
        name, _, heading = target.partition("#")
        file = folder / name
        if re.match(r"\w+:", target):
            continue
        linked = text if not name else file.read_text(encoding="utf-8") if heading and file.exists() else ""
        if (name and not file.exists()) or (heading and heading not in headings(linked)):
            yield target


def headings(text: str) -> set[str]:
    """The anchors of a document, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.*?) *$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_targets(text: str) -> Iterator[str]:
    """Targets of make that the Makefile does not have."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = "\n".join([*in_backticks(text), code_blocks(text)])
    for target in re.findall(r"^ *make +([a-z][a-z-]*)", commands, re.MULTILINE):
        if target not in targets:
            yield f"make {target}"


def missing_modules(text: str) -> Iterator[str]:
    """Modules that `python -m` is to run; those of other projects are not looked at."""
    for module in re.findall(r"-m +(\w+(?:\.\w+)*)", text):
        path = ROOT / module.replace(".", "/")
        if module.partition(".")[0] in CODE and not (path.with_suffix(".py").exists() or path.is_dir()):
            yield module


def unknown_keys(text: str) -> Iterator[str]:
    """Words like `section.key` whose section is one of the config, and that are no key of it."""
    sections = {name.partition(".")[0] for name in keys()}
    for word in words_of_code(text):
        found = re.fullmatch(r"((\w+)\.(\w+))(=.*)?", word)
        if found and found[2] in sections and f".{found[3]}" not in SUFFIXES and found[1] not in keys():
            yield word


@functools.cache
def words_in_the_code() -> frozenset[str]:
    """Every word of the Python and shell files of the project, but for this test."""
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path != Path(__file__)]
    texts = [path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".sh", ".sbatch")]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


def unknown_names(text: str) -> Iterator[str]:
    """Names of classes, functions, methods and tables that no code has, as `Class.method` or `TABLE`."""
    for name in in_backticks(text):
        is_name = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) and not looks_like_ours(name)
        if is_name and not words_in_the_code().issuperset(name.split(".")):
            yield name


@functools.cache
def options_in_the_code() -> frozenset[str]:
    """Every option such as `--dry-run` in the Python and shell files of the project, without this test."""
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path != Path(__file__)]
    texts = [
        path.read_text(encoding="utf-8") for path in [*files, ROOT / "pyproject.toml"] if path.suffix in CODE_FILES
    ]
    return frozenset(option for text in texts for option in re.findall(r"--[a-z][\w-]+", text))


def unknown_options(text: str) -> Iterator[str]:
    """Options of our own commands, and options that stand alone in backticks, that no code has."""
    ours = r"(.* )?(python -m (ddpm_dist|launch)|slurm/local-cluster|launch/torchrun.sh)\b.*"
    commands = [command.text for command in commands_in(text) if re.match(ours, command.text)]
    for code in [*commands, *(span for span in in_backticks(text) if span.startswith("--"))]:
        for option in re.findall(r"(?<![\w'-])--[a-z][\w-]*", code):
            if option not in options_in_the_code() | OPTIONS_OF_OTHERS:
                yield option


CHECKS: list[Callable[[str], Iterator[str]]] = [
    *(missing_files, missing_targets, missing_modules, unknown_keys, unknown_names, unknown_options),
]


def test_there_are_documents_to_check() -> None:
    assert ROOT / "README.md" in DOCUMENTS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document: Path, check: Callable[[str], Iterator[str]]) -> None:
    assert list(check(document.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    assert list(dead_links(document.read_text(encoding="utf-8"), document.parent)) == []


def test_every_picture_is_shown() -> None:
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    assert [path for path in (ROOT / "docs").rglob("*.png") if not any(f"{path.name})" in text for text in texts)] == []


def test_the_pictures_of_the_quick_start_are_as_large_as_those_that_it_draws(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    images = torch.zeros(config.preview.num_images, *load(config.data).shape, dtype=torch.uint8)
    save_grid(images, tmp_path / "digits.png")
    save_curves([], tmp_path / "curves.png")
    for name in ("digits.png", "curves.png"):
        shown = Image.open(ROOT / "docs" / f"quickstart-{name}").size
        assert shown == Image.open(tmp_path / name).size, f"docs/quickstart-{name} is older than the quick start"


def test_every_promise_names_files_that_hold_tests() -> None:
    lines = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and line not in ("| what | shown by |", "|---|---|")]
    assert len(rows) > 20
    for row in rows:
        named = [ROOT / word for word in in_backticks(row) if word.startswith("tests/")]
        assert named, f"this row names no test: {row}"
        for path in named:
            files = sorted(path.glob("test_*.py")) if path.is_dir() else [path]
            assert files, path
            for file in files:
                assert re.search(r"^def test_", file.read_text(encoding="utf-8"), re.MULTILINE), f"{file} has no test"


def test_the_page_about_resuming_explains_every_exit_code() -> None:
    _, _, table = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8").partition("| exit code | meaning |")
    rows = re.findall(r"^\| (\d+) \|", table.partition("\n\n")[0], re.MULTILINE)
    assert sorted(map(int, rows)) == sorted(ExitCode)


@pytest.mark.parametrize(
    ("check", "text", "found"),
    [
        (missing_files, "`training/gone.py` and `data/batches.py`, `status.json`", ["training/gone.py"]),
        (missing_files, "    bash slurm/gone.sh configs/mnist.yaml", ["slurm/gone.sh"]),
        (missing_files, "```\npython tests/gone.py\n```", ["tests/gone.py"]),
        (missing_files, "`tests/gone/`, `tests/data/`, `launch/`, `runs/mnist`, `docs/x` and no path: tests/y", [
            "tests/gone/", "docs/x",
        ]),
        (missing_files, "| `training/` | `step.py`, `vote.py` |\n`step.py`", ["vote.py", "step.py"]),
        (unknown_names, "`SCHEDULES`, `Lease.check`, `Lease.chekc`, `train_setp`", ["Lease.chekc", "train_setp"]),
        (dead_links, "[a](README.md) [b](gone.md) [c](https://example.org/x) [d](#here) [e](#Here)\n# Here", [
            "gone.md", "#Here",
        ]),
        (dead_links, "[a](README.md#quick-start) [b](README.md#slow-start)", ["README.md#slow-start"]),
        (missing_targets, "`make test`, `make rain`, to make sense", ["make rain"]),
        (missing_targets, "    make train\n    make trains  # make sense", ["make trains"]),
        (unknown_options, "`python -m ddpm_dist.train --dry-rum`, `--sweep`, `--sweeep a=b`, `sbatch --gone`", [
            "--dry-rum", "--sweeep",
        ]),
        (missing_modules, "`python -m ddpm_dist.gone`, -m launch.submit, -m pip", ["ddpm_dist.gone"]),
        (unknown_keys, "`optim.lr=1e-4`, `optim.rate=1`, `train.sbatch`, `data.name`, `launch.submit`", [
            "optim.rate=1",
        ]),
    ],
)  # fmt: skip
def test_the_checks_see_what_is_missing(check: Callable[[str], Iterator[str]], text: str, found: list[str]) -> None:
    assert list(check(text)) == found

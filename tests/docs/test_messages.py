"""Every message that docs/troubleshooting.md and docs/resuming.md quote is one that the program really prints."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("troubleshooting.md", "resuming.md")]
FOREIGN_CHARACTERS = 12  # so many letters of a message must be fixed, or everything would look like a message


def quoted(text: str) -> list[str]:
    """The lines of all blocks that are fenced as `text`: what the program prints."""
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def in_shell_words(text: str) -> list[str]:
    """What the tables say of the batch shell's log: the words in backticks at the beginning of a row."""
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [words for row in rows for words in re.findall(r"`([^`]+)`", row)]


@functools.cache
def messages() -> tuple[re.Pattern[str], ...]:
    """One pattern for each text in the code, in which anything may stand for what is filled in."""
    found = {".*?".join(map(re.escape, re.split(r"\$\w+", line))) for line in _shell_lines()}
    for folder in ("ddpm_dist", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
                if sum(len(text) for text in texts if isinstance(text, str)) >= FOREIGN_CHARACTERS:
                    found.add("".join(re.escape(text) if isinstance(text, str) else ".*?" for text in texts))
    return tuple(re.compile(f"(error: )?(rank \\d+: )?{each}(; silent: .*)?") for each in sorted(found))


def _shell_lines() -> list[str]:
    return re.findall(r'error: ([^"]*)"', (ROOT / "launch" / "torchrun.sh").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_quotes_what_the_program_prints(page: Path) -> None:
    lines = quoted(page.read_text(encoding="utf-8"))
    assert lines
    assert [line for line in lines if not any(pattern.fullmatch(line) for pattern in messages())] == []


def test_the_page_quotes_what_the_batch_shell_says() -> None:
    text = PAGES[0].read_text(encoding="utf-8").partition("### The job does not come back")[2].partition("\n##")[0]
    shell = (ROOT / "slurm" / "requeue.sh").read_text(encoding="utf-8")
    words = in_shell_words(text)
    assert len(words) >= 8
    assert [each for each in words if re.sub(r"\d+", "$code", each) not in shell and each not in shell] == []


def test_a_message_that_nobody_prints_is_noticed() -> None:
    text = "```text\nerror: runs/mnist: is being eaten by attempt 3 (host a); stop that one first\n```\n"
    assert not any(pattern.fullmatch(line) for line in quoted(text) for pattern in messages())

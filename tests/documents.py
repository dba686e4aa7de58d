"""The documents of the project: which shell commands they print, and what the registry says of each.

Commands stand in blocks of code (indented by four blanks, or fenced and marked `sh` or `console`, or not marked at all)
and in `backticks`. A block that is no shell is marked with another word, such as `text` or `yaml`.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
REGISTRY = ROOT / "tests" / "docs" / "commands.toml"
SHELL = {"sh", "bash", "shell", "console"}
KNOWN = """
. apptainer apt-get awk bash cat cd chmod conda cp curl df docker du echo env export find git grep head jq kill less
ln ls make mkdir mlflow module mv mypy nohup nproc nvidia-smi pip pkill podman pre-commit ps pytest python python3 rm
rsync ruff sacct salloc sbatch scancel scontrol sed seq sh sinfo singularity sleep source squeue srun ssh sudo tail
tar timeout torchrun touch uname unzip uv watch wget
"""
PROGRAMS = frozenset(KNOWN.split())
OUR_PROGRAMS = r"(\./)?(launch|slurm|\.ci)/[\w.-]+|(\./)?\.venv/bin/[\w.-]+"
# A word that the reader has to replace: RUN_DIR, <this repository>, [data.root=...], `...`.
PLACEHOLDER = re.compile(
    r"<[^<>]+>|(?<= )\[[^\]]*\]|\.\.\.|(?<![\w$={/.-])[A-Z][A-Z_]*[A-Z](?![\w=])|(?<=[ =])N(?=\s|$)"
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: the number of its first line, from 1.
        language: the word behind the fence; "" for none, and for an indented block.
        lines: its lines, without indentation.
    """

    line: int
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A shell command as a document prints it.

    Attributes:
        text: the command, without prompt and comment. Continued lines are joined.
        place: document:line.
        block: the place of its block, "" for inline code.
        output: the lines that a console shows below the command.
    """

    text: str
    place: str
    block: str = ""
    output: tuple[str, ...] = ()

    @property
    def has_blanks(self) -> bool:
        """Whether the reader has to put something in place of a word."""
        return PLACEHOLDER.search(self.text) is not None


@functools.cache
def split(text: str) -> tuple[tuple[Block, ...], str]:
    """(blocks of code, the text with an empty line for each of theirs)."""
    blocks: list[Block] = []
    prose: list[str] = []
    taken: list[str] = []
    language = first = None
    lines = text.splitlines()
    for number, line in enumerate([*lines, ""], start=1):
        fence = re.match(r" *```(\S*)", line)
        indented = line.startswith("    ") and first is None and (taken or not prose or not prose[-1].strip())
        if first is None and taken and not indented and line.strip():
            blocks.append(_indented(number, taken))
            taken = []
        if fence and first is None:
            language, first = fence[1], number + 1
        elif fence and language is not None and first is not None:
            blocks.append(Block(first, language, tuple(taken)))
            taken, language, first = [], None, None
        elif first is not None or (indented and line.strip()) or (taken and not line.strip()):
            taken.append(line if first is not None else line[4:])
        else:
            prose.append(line)
            continue
        prose.append("")
    if taken:
        blocks.append(_indented(len(lines) + 2, taken))
    return tuple(blocks), "\n".join(prose)


def _indented(end: int, lines: Sequence[str]) -> Block:
    return Block(end - len(lines), "", tuple("\n".join(lines).rstrip().split("\n")))


def is_command(line: str) -> bool:
    """Whether a line starts with a program that is known here, after a prompt and settings of variables."""
    words = re.sub(r"^(\$ )?(\w+=\S* +)*", "", line).split()
    return bool(words) and (words[0] in PROGRAMS or re.fullmatch(OUR_PROGRAMS, words[0]) is not None)


def commands_in(text: str, name: str = "text") -> list[Command]:
    """All commands of a document, in the order of its lines; those of a block come one after the other."""
    blocks, prose = split(text)
    found = [command for block in blocks for command in _in_block(block, name)]
    for span in re.finditer(r"`([^`]+)`", prose):
        inline = " ".join(span[1].replace("\\|", "|").split())
        if is_command(inline) and " " in inline:
            found.append(Command(inline, f"{name}:{prose.count(chr(10), 0, span.start()) + 1}"))
    return found


def _in_block(block: Block, name: str) -> Iterator[Command]:
    if block.language and block.language not in SHELL:
        return
    place = f"{name}:{block.line}"
    with_prompts = any(line.startswith("$ ") for line in block.lines)
    all_lines = not with_prompts and (block.language in SHELL or is_command(block.lines[0]))
    lines = list(enumerate(block.lines))
    while lines:
        number, line = lines.pop(0)
        starts = line.startswith("$ ") if with_prompts else all_lines or is_command(line)
        if not starts or not line.strip() or line.startswith(("#", "http://", "https://")):
            continue
        while line.endswith("\\") and lines:
            line = f"{line[:-1].rstrip()} {lines.pop(0)[1].strip()}"
        if here := re.search(r"<<-?\s*['\"]?(\w+)", line):
            while lines:
                line = f"{line}\n{lines.pop(0)[1]}"
                if line.endswith(f"\n{here[1]}"):
                    break
        shown = []
        while with_prompts and lines and not lines[0][1].startswith("$ "):
            shown.append(lines.pop(0)[1])
        yield Command(_without_comment(line.removeprefix("$ ")), f"{name}:{block.line + number}", place, tuple(shown))


def _without_comment(line: str) -> str:
    for comment in re.finditer(r"\s+#(?=\s)[^\n]*$", line):
        before = line[: comment.start()]
        if before.count("'") % 2 == before.count('"') % 2 == 0:
            return before
    return line.rstrip()


@functools.cache
def all_commands() -> tuple[Command, ...]:
    """The commands of all documents."""
    return tuple(
        command
        for path in DOCUMENTS
        if path.name != "CHANGELOG.md"  # it tells of commands that once were
        for command in commands_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    )


@functools.cache
def configs_in_documents() -> Mapping[str, tuple[str, str]]:
    """{place: (file, YAML)} of all configs that documents show.

    They are blocks marked `yaml`, whose file is the comment in the first line, or empty; and `cat > FILE.yaml <<'END'`.
    """
    found = {}
    for path in DOCUMENTS:
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        for block in split(text)[0]:
            if block.language == "yaml":
                named = re.fullmatch(r"# ([\w./-]+\.yaml)", block.lines[0])
                found[f"{name}:{block.line}"] = named[1] if named else "", "\n".join(block.lines)
        for command in commands_in(text, name):
            if written := re.fullmatch(r"cat > (\S+\.yaml) <<\S+\n(.*)\n\w+", command.text, re.DOTALL):
                found[command.place] = written[1], written[2]
    return found


@dataclass(frozen=True)
class Entry:
    """What becomes of a command, or of several lines of a block that belong together.

    Attributes:
        text: the command, exactly as the documents print it.
        run: it is executed as printed; these regular expressions are found in its output.
        until: it is executed as printed, and stopped as by Ctrl-C once this is found in its output.
        slurm: like `run`, on a real SLURM.
        reason: why it is not executed.
        test: the test that runs the same command otherwise, file::function.
        exit: the exit code; without it 0, and 75 for `until`.
        files: what is there afterwards.
        given: what is there before: run directories (a small trained run) and files of the scratch checkout.
        blanks: what stands for the placeholders of the text.
        as_printed: whether the output has each line that the document shows below the command.
        trains: with `slurm`, the run directory whose job is awaited and then cancelled.
    """

    text: str
    run: tuple[str, ...] | None = None
    until: str = ""
    slurm: tuple[str, ...] | None = None
    reason: str = ""
    test: str = ""
    exit: int | None = None
    files: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    blanks: Mapping[str, str] = field(default_factory=dict)
    as_printed: bool = False
    trains: str = ""

    @property
    def ways(self) -> int:
        """How many of run, until, slurm and reason it has; it ought to be one."""
        return sum((self.run is not None, bool(self.until), self.slurm is not None, bool(self.reason)))

    def filled(self) -> str:
        """The text with something in place of each placeholder."""
        text = self.text
        for placeholder, value in self.blanks.items():
            text = text.replace(placeholder, value)
        return text


@functools.cache
def registry() -> Mapping[str, Entry]:
    """{text: entry} of commands.toml."""
    entries = []
    for table in tomllib.loads(REGISTRY.read_text(encoding="utf-8"))["command"]:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in table.items()
        }
        entries.append(Entry(**values))
    found = {entry.text: entry for entry in entries}
    assert len(found) == len(entries), f"{REGISTRY}: a command is listed twice"
    return found


def assign(commands: Sequence[Command], entries: Sequence[str]) -> tuple[dict[str, list[Command]], list[Command]]:
    """Find the entry of each command: of as many lines of its block as possible.

    Inline code may also be the beginning of an entry, as where a sentence names a command without its arguments, and a
    form to be filled in, such as `python -m ddpm_dist.sync RUN_DIR`.

    Returns:
        ({text of an entry: commands that it covers}, commands without an entry).
    """
    used: dict[str, list[Command]] = {text: [] for text in entries}
    unknown: list[Command] = []
    rest = list(commands)
    beginnings = [_bare(line) for text in entries for line in text.splitlines()]
    while rest:
        block = [command.text for command in rest if command.block and command.block == rest[0].block] or [rest[0].text]
        for count in range(len(block), 0, -1):
            if (text := "\n".join(block[:count])) in used:
                used[text] += rest[:count]
                break
        else:
            count, command = 1, rest[0]
            named = not command.block and any(f"{line} ".startswith(f"{_bare(command.text)} ") for line in beginnings)
            if not named and (command.block or not command.has_blanks):
                unknown.append(command)
        rest = rest[count:]
    return used, unknown


def _bare(line: str) -> str:
    return line.removeprefix(".venv/bin/")

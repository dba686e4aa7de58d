"""Every shell command in the documents works as printed: commands.toml says how each is tried, or why it is not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from documents import ROOT, Entry, all_commands, assign, commands_in, registry
from scratch import copy_of, execute

HOW_TO = """\
tests/docs/commands.toml does not say what becomes of this command. Add to it

[[command]]
text = {text}
run = ["words of its output"]

(its head explains `until`, `slurm` and `reason`), or mark the block with a word such as `text` if it is no shell."""


def test_every_command_of_a_document_is_in_the_registry() -> None:
    _, unknown = assign(all_commands(), list(registry()))
    said = [f"{command.place}: {HOW_TO.format(text=repr(command.text))}" for command in unknown]
    assert not unknown, "\n\n".join(said)


def test_every_entry_of_the_registry_is_printed_by_a_document() -> None:
    used, _ = assign(all_commands(), list(registry()))
    gone = [text for text, commands in used.items() if not commands]
    assert gone == [], "no document prints these commands any more: remove them from tests/docs/commands.toml"


@pytest.mark.parametrize("entry", registry().values(), ids=lambda entry: entry.text.splitlines()[0])
def test_an_entry_says_one_thing(entry: Entry) -> None:
    assert entry.ways == 1, "one of run, until, slurm and reason"
    assert set(entry.blanks) <= {blank for blank in entry.blanks if blank in entry.text}
    if entry.test:
        file, _, name = entry.test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), entry.test


@pytest.mark.parametrize("text", [text for text in registry() if re.search(r"(^| )make ", text)])
def test_make_takes_the_arguments_as_printed(text: str) -> None:
    """Also where the registry says why the command is not executed: make shows what it would do."""
    argv = ["bash", "-c", text.replace("make ", "make --dry-run ", 1)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for arguments in re.findall(r"ARGS=(?:'([^']*)'|\"([^\"]*)\"|(\S+))", text):
        assert "".join(arguments) in done.stdout


# Executed as printed


OF_OTHERS = ("torchrun", "mlflow")  # they end with tracebacks of their own after Ctrl-C
EXECUTED = [entry for entry in registry().values() if entry.run is not None or entry.until]


@pytest.mark.slow
@pytest.mark.parametrize("entry", EXECUTED, ids=lambda entry: entry.text.splitlines()[0])
def test_a_command_works_as_printed(entry: Entry, checkout: Path, tmp_path: Path) -> None:
    folder = copy_of(checkout, tmp_path / "ddpm_dist", entry)
    code, output = execute(folder, entry.filled(), until=entry.until)
    wanted = entry.exit if entry.exit is not None else 75 if entry.until else 0
    assert code == wanted, output
    if not entry.text.startswith(OF_OTHERS):
        assert "Traceback" not in output
    for words in entry.run or ():
        assert re.search(words, output, re.MULTILINE), f"{words!r} is not in\n{output}"
    for name in entry.files:
        assert (folder / name).exists(), f"no {name}\n{output}"
    if entry.as_printed:
        shown = {line for command in assign(all_commands(), [entry.text])[0][entry.text] for line in command.output}
        assert shown, "no document shows an output of this command"
        assert shown <= set(output.splitlines()), output


# The extractor


def test_commands_are_found_wherever_they_stand() -> None:
    text = """
Type `make train`, or `python -m
ddpm_dist.train --dry-run`; `make` and `configs/x.yaml` are no commands.

    git clone <this repository> && cd ddpm_dist   # a comment
    A=1 launch/torchrun.sh \\
        --config 'a # b'

| one | `sbatch a.sbatch \\| tail` |

```console
$ python -m ddpm_dist.train x=1
error: make no sense
$ export A=1
```

```sh
mystery --option
```

```
python a.py
unheard-of b
```

```text
make nothing
```

    a listing     make nothing
    cat <<'END' > file
    lines
    END
"""
    assert [(command.text, command.place) for command in commands_in(text)] == [
        ("git clone <this repository> && cd ddpm_dist", "text:5"),
        ("A=1 launch/torchrun.sh --config 'a # b'", "text:6"),
        ("python -m ddpm_dist.train x=1", "text:12"),
        ("export A=1", "text:14"),
        ("mystery --option", "text:18"),
        ("python a.py", "text:22"),
        ("unheard-of b", "text:23"),
        ("cat <<'END' > file\nlines\nEND", "text:31"),
        ("make train", "text:2"),
        ("python -m ddpm_dist.train --dry-run", "text:2"),
        ("sbatch a.sbatch | tail", "text:9"),
    ]
    assert commands_in(text)[2].output == ("error: make no sense",)


def test_lines_that_need_each_other_are_one_entry_and_unknown_ones_are_named() -> None:
    found = commands_in(
        "    cd a\n    make b\n    make c\n\n`make b`, `make`, `python -m a`, `python -m b DIR`, `make c d`"
    )
    used, unknown = assign(found, ["cd a\nmake b", "make gone", "python -m a --option"])
    assert {text: len(commands) for text, commands in used.items()} == {
        "cd a\nmake b": 2,
        "make gone": 0,
        "python -m a --option": 0,
    }
    assert [command.text for command in unknown] == ["make c", "make c d"]

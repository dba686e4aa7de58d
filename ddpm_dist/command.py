"""What all commands share: how they refuse a wrong command line, and how they print an error that a user can mend."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from ddpm_dist.config import nearest_key
from ddpm_dist.errors import ConfigError, ExitCode, UserError


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError, so that a wrong option ends with one line and exit code 78.

    Args:
        prog: the command, for its help.
        description: what it does, for its help.
        hints: what to write instead of an option that there is not, by the option as people write it, like `-p`.
        options: of ArgumentParser.
    """

    def __init__(
        self, *, prog: str, description: str | None, hints: Mapping[str, str] = MappingProxyType({}), **options: Any
    ) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_HelpFormatter, **options)
        self._hints = hints

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError that says what argparse says, and what is valid."""
        words = self._what_to_write(message) or f"{message}; `{self.prog} --help` shows what is valid"
        raise ConfigError(f"command line: {words}")

    def _what_to_write(self, message: str) -> str | None:
        """The message in the words of all other messages, with what is valid; None where it is to stay as it is."""
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: '(.*)'", message):
            number = {"int": "a whole number", "float": "a number"}[found[2]]
            return f"{found[1]} {found[3]}: expected {number}"
        if found := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = found[3].replace("'", "")
            return f"{found[1]} {found[2]}: expected one of {choices}"
        if found := re.fullmatch(r"argument (\S+): expected one argument", message):
            return f"{found[1]}: its value is missing; expected {found[1]} {self._placeholder(found[1])}"
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            return self._instead_of(found[1])
        return None

    def _placeholder(self, option: str) -> str:
        """What the help shows for the value of an option, like FILE."""
        action = self._option_string_actions[option]
        return str(action.metavar or action.dest.upper())

    def _instead_of(self, word: str) -> str | None:
        """What to write instead of an option, or a word, that this command does not take; None if nothing is near."""
        option, equals, value = word.partition("=")
        if option in self._hints:
            return f"{option}: {self._hints[option]}"
        if not option.startswith("-"):
            return f"{word!r} is one word too many; `{self.prog} --help` shows what is valid"
        shown = [name for name, each in self._option_string_actions.items() if each.help != argparse.SUPPRESS]
        if near := difflib.get_close_matches(option, shown, n=1, cutoff=0.75):
            return f"{option}: there is no such option; did you mean {near[0]}?"
        key = nearest_key(option.lstrip("-").replace("-", "_")) if self._takes_keys() else None
        if key is not None:
            given = value if equals else "VALUE"
            return f"{option}: keys of the config are written without dashes, here perhaps {key}={given}"
        return None

    def _takes_keys(self) -> bool:
        return any("section.key=value" in str(action.metavar) for action in self._actions)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves descriptions as they are, and makes no line longer than 100 characters or than the terminal is wide."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns))


INTERRUPTED = 130
_MEANINGS = {
    ExitCode.DATA: "the data or a checkpoint cannot be used",
    ExitCode.SOFTWARE: "a bug, or a machine, a disk or a network that failed: the same command tries again",
    ExitCode.PREEMPTED: "stopped and saved: the same command goes on at the next step",
    ExitCode.NO_PROGRESS: "diverged, or another attempt has taken over: the same command would not help",
    ExitCode.CONFIG: "the command line or the config is wrong",
    INTERRUPTED: "stopped with Ctrl-C",
}


def exit_codes(usual: Sequence[int], own: Mapping[int, str]) -> str:
    """The table of exit codes that ends the help of a command.

    Args:
        usual: those that mean what they mean for all commands.
        own: those that mean something else for this command, and 0.
    """
    meanings = {**{code: _MEANINGS[code] for code in usual}, **own}
    return "\n".join(["exit codes:", *(f"  {code:>3}  {meanings[code]}" for code in sorted(meanings))])


def as_typed(program: str) -> str:
    """How a person starts a program of this Python's environment from the shell and folder that this process is in.

    Args:
        program: like `python` or `mlflow`.

    Returns:
        The bare name if the shell finds this very program by it; else its path, relative if it lies below this folder,
        with quotes where the shell needs them.
    """
    here = Path(sys.executable).parent
    found = shutil.which(program)
    if (found is not None and Path(found).parent == here) or not (here / program).exists():
        return program
    path = here / program
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def one_line(error: Exception) -> tuple[int, str] | None:
    """(exit code, text to print) for an error that the user can mend; None for a bug of ours."""
    if isinstance(error, UserError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return ExitCode.SOFTWARE, f"error: {error.filename}: {error.strerror}"
    return None


def refuse(error: Exception) -> int:
    """Print the error as one line and return its exit code. An error that is a bug of ours is raised again."""
    said = one_line(error)
    if said is None:
        raise error
    print(said[1], file=sys.stderr, flush=True)
    return said[0]


def refuse_on_all(error: Exception, rank: int) -> int:
    """`refuse` for an error that every rank finds by itself: only rank 0 prints it. Returns the exit code."""
    said = one_line(error)
    if rank == 0 or said is None:
        return refuse(error)
    time.sleep(2)  # when a rank exits, the launcher kills the others: rank 0 must print first
    return said[0]


def leave_word(code: int) -> None:
    """Write the exit code into $DDPM_EXIT_CODE_FILE, for the batch script, which decides whether to restart the job.

    torchrun turns every code except 0 into 1, and a refused command has no run directory that could hold its code.
    """
    path = os.environ.get("DDPM_EXIT_CODE_FILE")
    if path:
        with contextlib.suppress(OSError):  # without the file the batch script assumes a crash, and tries again
            Path(path).write_text(f"{int(code)}\n")


def nobody_reads() -> int:
    """End quietly after a BrokenPipeError, as in `... | head`. Returns the exit code.

    At exit Python writes what is left in its buffer, and would print an error. So standard output becomes /dev/null.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0

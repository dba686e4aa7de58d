"""What all commands share: how they refuse a wrong command line, and how they print an error that a user can mend."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from ddpm_dist.errors import ConfigError, ExitCode, UserError


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError, so that a wrong option ends with one line and exit code 78."""

    def __init__(self, *, prog: str, description: str | None, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError with argparse's message."""
        raise ConfigError(f"command line: {message}; `{self.prog} --help` shows what is valid")


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


def nobody_reads() -> int:
    """End quietly after a BrokenPipeError, as in `... | head`. Returns the exit code.

    At exit Python writes what is left in its buffer, and would print an error. So standard output becomes /dev/null.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0

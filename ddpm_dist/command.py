"""What all commands share: how a command line is refused, and how an error that the user can mend is said."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from ddpm_dist.errors import ConfigError, ExitCode, UserError


class CommandLine(argparse.ArgumentParser):
    """argparse whose mistakes are ConfigErrors: one line and exit code 78, as for every other mistake."""

    def __init__(self, *, prog: str, description: str | None, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; `{self.prog} --help` shows what is valid")


def one_line(error: Exception) -> tuple[int, str] | None:
    """(exit code, what to print) for an error that the user can mend; None for our own bugs."""
    if isinstance(error, UserError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return ExitCode.SOFTWARE, f"error: {error.filename}: {error.strerror}"
    return None


def refuse(error: Exception) -> int:
    """Print the one line and return the exit code. Raises the error itself where it is a bug of ours."""
    said = one_line(error)
    if said is None:
        raise error
    print(said[1], file=sys.stderr, flush=True)
    return said[0]


def nobody_reads() -> int:
    """After a BrokenPipeError: `... | head` has seen enough. Python would complain once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0

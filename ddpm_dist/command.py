"""What all commands share: how they refuse a wrong command line, and how they report an error that a user can mend."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from ddpm_dist.errors import ConfigError, ExitCode, UserError


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError: a wrong option ends as a wrong key does, in one line and code 78."""

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
    """Print the error as one line and return its exit code. An error that is a bug of ours is raised again."""
    said = one_line(error)
    if said is None:
        raise error
    print(said[1], file=sys.stderr, flush=True)
    return said[0]


def nobody_reads() -> int:
    """End quietly after a BrokenPipeError, as in `... | head`. Returns the exit code.

    Python would try to write the rest when it exits, and complain: the rest goes to /dev/null.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0

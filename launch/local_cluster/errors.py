"""What the user is told, in one message, before the program exits with 1."""

from __future__ import annotations


class LocalClusterError(Exception):
    """The cluster cannot do what was asked; the message says why, and what the user can do."""

    program = "local-cluster"

    def __str__(self) -> str:
        return f"{self.program}: error: {super().__str__()}"


class RehearsalError(LocalClusterError):
    """The rehearsal could not go on."""

    program = "drill"

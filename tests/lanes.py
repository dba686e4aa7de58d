"""Which tests `make test` may run beside each other, in two processes.

A file stays in one process, with the fixtures that its tests share. So do all tests on SLURM, which share clusters, and
whose commands must not wait for those of a second cluster. They come first: they take a third of the time, and most of
it they only wait.
"""

from __future__ import annotations

from xdist.scheduler.loadscope import LoadScopeScheduling

ON_SLURM = "tests/slurm/"


class Lanes(LoadScopeScheduling):  # type: ignore[misc]
    """Hands whole files to processes, and tests/slurm as if it were one file."""

    def _split_scope(self, nodeid: str) -> str:
        return ON_SLURM if nodeid.startswith(ON_SLURM) else nodeid.partition("::")[0]

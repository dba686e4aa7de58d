"""What a check looks at, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.cluster import Cluster, Fields
from launch.request import Request
from launch.site import Site

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:8} {self.subject:14} {self.text}"


@dataclass(frozen=True)
class Case:
    """All that a check may look at.

    Attributes:
        partition: the one that the job would run in.
        excluded: nodes that the request leaves out.
    """

    request: Request
    cluster: Cluster
    site: Site
    partition: Fields
    excluded: frozenset[str] = frozenset()

    def nodes(self) -> dict[str, Fields]:
        found = self.cluster.nodes_of(self.partition)
        return {name: fields for name, fields in found.items() if name not in self.excluded}

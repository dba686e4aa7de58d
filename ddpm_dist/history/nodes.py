"""On which nodes attempts die, according to the files in `attempts/`; and a short way to write many names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_DEATHS = 2  # a single death may have any cause
CLEAR_DIFFERENCE = 0.5  # between the shares of attempts that died with and without a node; decides for few attempts
CLEAR_CHANCE = 0.05  # of as many deaths or more if the node were like the others; decides for many attempts


@dataclass(frozen=True)
class Outcome:
    """What the end of an attempt says about its nodes.

    Attributes:
        nodes: those on which the attempt ran.
        died: it was killed or crashed, or failed by an error that is not the user's. A preemption is no death.
        failed_node: the node of the rank that is known to be at fault; no other node is blamed for this death.
    """

    nodes: tuple[str, ...]
    died: bool
    failed_node: str | None = None

    @property
    def suspects(self) -> tuple[str, ...]:
        """The nodes that may have caused this death; () if the attempt did not die."""
        if not self.died:
            return ()
        return (self.failed_node,) if self.failed_node in self.nodes and self.failed_node else self.nodes


@dataclass(frozen=True)
class Suspicion:
    """Nodes on which attempts die. As text: the numbers, and the SLURM option that leaves these nodes out.

    Attributes:
        nodes: one, or several that always ran together, so that it is not known which of them is to blame.
        died, attempts: how many of the attempts on them died, and how many there were.
        died_elsewhere, attempts_elsewhere: the same of the attempts that ran without them.
        named: deaths in which the rank at fault is known to have run there.
        besides: nodes that were found before; the deaths that they explain are left out of the numbers.
    """

    nodes: tuple[str, ...]
    died: int
    attempts: int
    died_elsewhere: int
    attempts_elsewhere: int
    named: int
    besides: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """The share of attempts that died with these nodes minus that without, in [-1, 1].

        0 if no attempt ran without them.
        """
        if not self.attempts_elsewhere:
            return 0.0
        return self.died / self.attempts - self.died_elsewhere / self.attempts_elsewhere

    @property
    def chance(self) -> float:
        """How likely as many deaths here, or more, would be if nodes did not matter: in [0, 1].

        Fisher's exact test, one-sided.
        """
        total, deaths = self.attempts + self.attempts_elsewhere, self.died + self.died_elsewhere
        ways = (
            math.comb(deaths, here) * math.comb(total - deaths, self.attempts - here)
            for here in range(self.died, min(deaths, self.attempts) + 1)
        )
        return sum(ways) / math.comb(total, self.attempts)

    def __str__(self) -> str:
        names = compress(self.nodes)
        one = len(self.nodes) == 1
        said = f"{names}: {self.died} of {'its' if one else 'their'} {self.attempts} attempts died"
        if self.attempts_elsewhere:
            said += f", {self.died_elsewhere} of {self.attempts_elsewhere} elsewhere"
        if self.named > 1:
            said += f"; the rank at fault is known to have sat there {self.named} times"
        if self.besides:
            said += f" (without the deaths on {compress(self.besides)})"
        if not one:
            said += "; they were never apart, so it may be any of them"
        return f"{said}; leave {'it' if one else 'them'} out: --exclude={names}"


def suspicious_nodes(outcomes: Iterable[Outcome]) -> list[Suspicion]:
    """Nodes on which at least MIN_DEATHS attempts died, and markedly more than without them; the worst first.

    A node that only ran beside a bad one is not listed: once a node is listed, the deaths that it may explain are
    left out before the other nodes are looked at. If every attempt ran on a node, there is nothing to compare it
    with, and it is listed only for ranks on it that are known to be at fault.

    Args:
        outcomes: of attempts; those without known nodes say nothing.
    """
    left = [each for each in outcomes if each.nodes]
    found: list[Suspicion] = []
    while True:
        named_before = tuple(node for each in found for node in each.nodes)
        groups = _never_apart(left)
        tallies = [_tally(left, group, named_before) for group in groups if not set(group) & set(named_before)]
        known = sum(each.died and each.failed_node is not None for each in left)
        suspicions = [each for each in tallies if _stands_out(each, len(groups), known)]
        if not suspicions:
            return found
        worst = max(_weight(each) for each in suspicions)
        new = [each for each in suspicions if _weight(each) == worst]
        found += new
        blamed = {node for each in new for node in each.nodes}
        left = [each for each in left if not blamed & set(each.suspects)]


def _never_apart(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """The nodes in groups: together are those that ran in the same attempts and may have caused the same deaths."""
    groups: dict[tuple[tuple[bool, bool], ...], list[str]] = {}
    for node in dict.fromkeys(node for each in outcomes for node in each.nodes):
        history = tuple((node in each.nodes, node in each.suspects) for each in outcomes)
        groups.setdefault(history, []).append(node)
    return [tuple(group) for group in groups.values()]


def _tally(outcomes: Sequence[Outcome], group: tuple[str, ...], besides: tuple[str, ...]) -> Suspicion:
    node = group[0]  # the others have the same history
    here = [each for each in outcomes if node in each.nodes]
    elsewhere = [each for each in outcomes if node not in each.nodes]
    return Suspicion(
        nodes=group,
        died=sum(node in each.suspects for each in here),
        attempts=len(here),
        died_elsewhere=sum(each.died for each in elsewhere),
        attempts_elsewhere=len(elsewhere),
        named=sum(each.suspects == (node,) and each.failed_node == node for each in here),
        besides=besides,
    )


def _stands_out(tally: Suspicion, num_groups: int, known: int) -> bool:
    if tally.died < MIN_DEATHS:
        return False
    # With many nodes some look bad by chance alone, so the chance is multiplied by their number (Bonferroni).
    clear = tally.difference >= CLEAR_DIFFERENCE or (tally.difference > 0 and tally.chance * num_groups <= CLEAR_CHANCE)
    return clear or (num_groups > 1 and tally.named >= MIN_DEATHS and 2 * tally.named >= known)


def _weight(tally: Suspicion) -> tuple[float, float, int]:
    """The larger, the more suspicious. What is known of ranks counts before what is concluded from shares."""
    return (tally.named if tally.named >= MIN_DEATHS else 0, round(tally.difference, 9), tally.died)


def why_nobody(outcomes: Iterable[Outcome]) -> str:
    """What to tell the user if attempts died and no node is suspicious; "" if fewer than MIN_DEATHS died."""
    known = [each for each in outcomes if each.nodes]
    died = sum(each.died for each in known)
    if died < MIN_DEATHS:
        return ""
    count = f"{died} of {len(known)} attempts died"
    groups = {frozenset(each.nodes) for each in known}
    if len(groups) > 1:
        return f"{count}; no node stands out"
    nodes = known[0].nodes
    if len(nodes) == 1:
        return f"{count}, but all {len(known)} ran on {nodes[0]}: nothing tells whether it is the node"
    return f"{count}, but all {len(known)} ran on the same nodes ({compress(nodes)}): nothing tells which of them it is"


def compress(names: Iterable[str]) -> str:
    """`gpu03,gpu04,gpu05,x` -> `gpu[03-05],x`, as SLURM writes and reads it; one or two names stay as they are."""
    names = list(dict.fromkeys(names))
    if len(names) <= 2:
        return ",".join(names)
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)([0-9]{1,18})", name)
        numbers.setdefault((match[1], len(match[2])) if match else (name, 0), set()).add(int(match[2]) if match else 0)
    return ",".join(prefix + _ranges(sorted(found), width) for (prefix, width), found in numbers.items())


def _ranges(numbers: list[int], width: int) -> str:
    """`[03-05,07]` of ascending numbers with this many digits; "" for the width 0: a name without a number."""
    if not width:
        return ""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    parts = [f"{low:0{width}d}" + (f"-{high:0{width}d}" if high > low else "") for low, high in ends]
    return parts[0] if len(numbers) == 1 else f"[{','.join(parts)}]"

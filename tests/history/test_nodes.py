"""Which node is named: one that attempts die on, and none where nothing tells the nodes apart."""

from __future__ import annotations

import pytest

from ddpm_dist.history.nodes import Outcome, compress, suspicious_nodes, why_nobody


def died(*nodes: str, failed_node: str | None = None) -> Outcome:
    return Outcome(nodes, True, failed_node)


def lived(*nodes: str) -> Outcome:
    """Finished or preempted."""
    return Outcome(nodes, False)


def named(outcomes: list[Outcome]) -> list[tuple[str, ...]]:
    return [each.nodes for each in suspicious_nodes(outcomes)]


def test_a_node_on_which_most_die_is_named_with_numbers_and_what_to_do() -> None:
    bad = [died("node1", "node3"), died("node2", "node3"), died("node4", "node3"), lived("node5", "node3")]
    good = [lived("node1", "node2"), lived("node2", "node4"), lived("node4", "node5"), lived("node1"), lived("node5")]
    (found,) = suspicious_nodes([*bad, *good])
    assert str(found) == "node3: 3 of its 4 attempts died, 0 of 5 elsewhere; leave it out: --exclude=node3"


@pytest.mark.parametrize(
    "outcomes",
    [
        [died("a", "x"), died("b", "x"), lived("a", "b")],
        [died("x"), died("x"), lived("a")],
        [died("x"), lived("x"), died("x"), lived("a"), lived("b"), lived("a")],
    ],
)
def test_few_attempts_are_enough(outcomes: list[Outcome]) -> None:
    assert named(outcomes) == [("x",)]


@pytest.mark.parametrize(
    "outcomes",
    [
        pytest.param([], id="no attempts"),
        pytest.param([died("x"), lived("a"), lived("b")], id="one death may be anything"),
        pytest.param([died("x"), died("x"), died("x")], id="one node, always the same"),
        pytest.param([died("a", "b"), lived("a", "b"), died("b", "a")], id="the same nodes each time"),
        pytest.param([lived("x")] * 9 + [lived("a")], id="preemptions are no deaths"),
        pytest.param([died("x"), died("x"), died("a"), died("b"), died("a")], id="they die everywhere: it is the code"),
        pytest.param([died("x"), died("x"), died("a"), lived("a")] + [lived("x")] * 2, id="as often as elsewhere"),
        pytest.param([died("x")] * 2 + [lived("x")] * 18 + [lived("a")] * 20, id="rare, and not shown to be otherwise"),
        pytest.param([died("x")] * 2 + [lived("x")] * 18 + [lived("a")], id="hardly anything to compare with"),
        pytest.param([died(), died(), lived()], id="nodes not known"),
    ],
)
def test_nobody_is_named_without_grounds(outcomes: list[Outcome]) -> None:
    assert named(outcomes) == []


def test_many_attempts_show_a_smaller_difference() -> None:
    outcomes = [died("x")] * 6 + [lived("x")] * 14 + [died("a")] + [lived("a")] * 39
    assert named(outcomes) == [("x",)]


def test_of_many_nodes_one_looks_bad_by_chance_and_is_not_named() -> None:
    """3 deaths of 10 attempts would be unlikely (p = 0.03) if x had been singled out before anybody looked."""
    others = [outcome for name in "abcdefgh" for outcome in [lived(name)] * 9]
    others += [died(name) for name in "abcd"] + [lived(name) for name in "efgh"]
    assert named([died("x")] * 3 + [lived("x")] * 7 + others) == []


def test_company_of_a_bad_node_is_not_named() -> None:
    """`a` was in both deaths too, but only together with x."""
    outcomes = [died("a", "x"), died("a", "x"), lived("a", "b"), lived("b", "c"), lived("c", "b")]
    assert named(outcomes) == [("x",)]


def test_two_bad_nodes_are_both_named() -> None:
    outcomes = [died("x", "a"), died("x", "b"), died("x", "c"), died("y", "a"), died("y", "b")]
    outcomes += [lived("a", "b"), lived("b", "c"), lived("a", "c"), lived("c", "a")]
    assert sorted(named(outcomes)) == [("x",), ("y",)]
    assert "(without the deaths on x)" in str(suspicious_nodes(outcomes)[1])


def test_nodes_that_were_never_apart_are_named_together() -> None:
    (found,) = suspicious_nodes([died("x", "y"), died("y", "x"), lived("a", "b")])
    assert found.nodes == ("x", "y")
    assert "2 of their 2 attempts died, 0 of 1 elsewhere; they were never apart" in str(found)
    assert str(found).endswith("--exclude=x,y")


def test_a_rank_known_to_be_at_fault_tells_nodes_apart_that_were_always_together() -> None:
    (found,) = suspicious_nodes([died("a", "x", "b", failed_node="x")] * 2 + [lived("a", "x", "b")])
    assert found.nodes == ("x",)
    assert "2 of its 3 attempts died; the rank at fault is known to have sat there 2 times" in str(found)


def test_a_death_of_a_known_node_clears_the_others() -> None:
    assert named([died("a", "x", failed_node="x")] * 2 + [lived("b"), lived("b")]) == [("x",)]


def test_ranks_at_fault_on_ever_other_nodes_accuse_none() -> None:
    nodes = ("a", "b", "c", "d", "e")
    assert named([died(*nodes, failed_node=node) for node in (*nodes, "a")]) == []


def test_why_nobody_is_named() -> None:
    assert why_nobody([died("a"), lived("a")]) == ""
    assert "but all 3 ran on a: nothing tells whether it is the node" in why_nobody([died("a"), died("a"), lived("a")])
    same = why_nobody([died("a", "b"), died("b", "a")])
    assert same.startswith("2 of 2 attempts died, but all 2 ran on the same nodes (a,b)")
    assert why_nobody([died("a"), died("b"), lived("c")]).endswith("no node stands out")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        ([], ""),
        (["gpu03", "gpu04"], "gpu03,gpu04"),
        (["gpu04", "gpu03", "gpu05", "gpu07", "x"], "gpu[03-05,07],x"),
        (["n8", "n9", "n10", "n11"], "n[8-9],n[10-11]"),
        (["rack1-n1", "rack1-n2", "rack1-n3", "rack2-n1"], "rack1-n[1-3],rack2-n1"),
        (["a", "b", "c", "a"], "a,b,c"),
        (["7", "8", "9"], "[7-9]"),
    ],
)
def test_many_names_are_written_as_slurm_writes_them(names: list[str], short: str) -> None:
    assert compress(names) == short

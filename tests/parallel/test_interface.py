"""The interface that gloo is told to use. Nodes that need it are in tests/slurm."""

from __future__ import annotations

import os

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch's own lists leave it out

from ddpm_dist.parallel.interface import VARIABLE, choose_interface, interface_with, local_address_towards


def test_the_way_to_loopback_is_the_loopback_interface() -> None:
    assert local_address_towards("127.0.0.1").startswith("127.")
    assert interface_with("127.0.0.1") == "lo"


def test_without_a_way_there_is_no_interface() -> None:
    assert local_address_towards("") == "127.0.0.1"
    assert interface_with("203.0.113.77") is None


@pytest.mark.parametrize(("master", "given", "chosen"), [("127.0.0.1", None, None), ("127.0.0.1", "eth7", "eth7")])
def test_loopback_alone_and_what_the_user_set_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, master: str, given: str | None, chosen: str | None
) -> None:
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.delenv(VARIABLE, raising=False)
    if given:
        monkeypatch.setenv(VARIABLE, given)
    choose_interface(HashStore(), 0, 1)
    assert os.environ.get(VARIABLE) == chosen


def test_the_master_takes_the_way_to_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    monkeypatch.setenv(VARIABLE, "set so that the test undoes it")
    monkeypatch.delenv(VARIABLE)
    asked: list[str] = []

    def towards(host: str) -> str:
        asked.append(host)
        return "127.0.0.1" if host == "127.0.1.1" else "198.51.100.1"

    monkeypatch.setattr("ddpm_dist.parallel.interface.local_address_towards", towards)
    monkeypatch.setattr("ddpm_dist.parallel.interface.interface_with", {"198.51.100.1": "ib0"}.get)
    store = HashStore()
    store.set("address/1", "198.51.100.2")
    choose_interface(store, 0, 2)
    assert asked == ["127.0.1.1", "198.51.100.2"]
    assert os.environ[VARIABLE] == "ib0"

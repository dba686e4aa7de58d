"""The contract of a run: what was decided at step 0 and binds every attempt, kept in each checkpoint.

Three kinds of terms. The images of the run must stay the same. What `auto` was decided to be (precision, memory
format) and where the cosine ends is obeyed. What the circumstances bring along (threads, device, versions, how this
machine rounds) is compared. What the config says is not here: `config.changes` compares configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ddpm_dist.config import Config
from ddpm_dist.data.images import Images
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.training.precision import Numerics, resolve

ARITHMETIC = 1
"""Goes up by one with each version of ddpm_dist that computes other bits from the same config."""

_WORDS = {
    "threads": "train.threads",
    "device": "kind of device",
    "torch": "version of torch",
    "arithmetic": "arithmetic of ddpm_dist",
    "canary": "gradient of a test batch (this machine rounds otherwise)",
}


def new_contract(config: Config, images: Images, decay_steps: int | None, device: torch.device) -> dict[str, Any]:
    """The terms of a run that starts now. Plain JSON. `canary` is added once there is a network."""
    return {
        **facts_of(images),
        "decay_steps": decay_steps,
        **dataclasses.asdict(resolve(config.train, device)),
        **circumstances(config, device),
    }


def circumstances(config: Config, device: torch.device) -> dict[str, Any]:
    """What this process brings along, and its rounding depends on.

    The number of threads counts only where it is meant to stay: in stream mode a rank has more of them when there
    are fewer ranks.
    """
    fixed_threads = config.elastic.mode == "bitwise" or config.train.threads is not None
    return {
        **({"threads": torch.get_num_threads()} if fixed_threads else {}),
        "device": device.type,
        "torch": str(torch.__version__),
        "arithmetic": ARITHMETIC,
    }


def mismatches(contract: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`what: old -> new` for each circumstance that is not the contract's.

    What the contract of an older version does not mention is no mismatch.
    """
    contract = {"arithmetic": 1, **contract}  # of runs that began before the number was kept
    return [
        f"{_WORDS[name]}: {contract[name]} -> {value}"
        for name, value in now.items()
        if name in contract and contract[name] != value
    ]


def hold_to_contract(contract: dict[str, Any], canary: str, ranks: Ranks, config: Config, step: int) -> str:
    """Compare every rank's circumstances with the contract, which takes rank 0's canary if it has none. Collective.

    A mismatch that is accepted becomes part of the contract: `deviations` says from which step on what was another,
    and later attempts are held to the new terms.

    Args:
        canary: of this rank; empty where the same gradient may come out in other bits each time.
        step: at which this attempt begins.

    Returns:
        a warning, or "".

    Raises:
        ConfigError: some rank would round otherwise, and elastic.on_mismatch says to fail.
        RankZeroFailed: on the other ranks.
    """
    now, elastic = circumstances(config, ranks.device), config.elastic
    if canary:
        contract.setdefault("canary", ranks.on_rank_zero(lambda should_stop: canary))
        now["canary"] = canary
    found = mismatches(contract, now)

    def refuse() -> None:
        if found and elastic.fails_on_mismatch:
            raise ConfigError(
                f"this run cannot go on here to the bit: {'; '.join(found)} "
                "(elastic.on_mismatch=warn goes on all the same)"
            )

    ranks.all_succeed(refuse)
    ours, *others = ranks.gather(len(found))
    who = [str(rank) for rank, count in enumerate(others, start=1) if count]
    if not ours and not who:
        return ""
    where = f" (on rank {', '.join(['0'] * bool(ours) + who)})" if who else ""
    changed = "; ".join(found) or "see those machines"
    contract["deviations"] = [*contract.get("deviations", []), f"from step {step} on{where}: {changed}"]
    contract.update({name: value for name, value in now.items() if name in contract or name == "arithmetic"})
    return f"warning: from here on results may be rounded otherwise{where}: {changed}"


def numerics_of(contract: Mapping[str, Any]) -> Numerics:
    """What `auto` was decided to be at step 0."""
    return Numerics(**{item.name: contract[item.name] for item in dataclasses.fields(Numerics)})


def facts_of(images: Images) -> dict[str, Any]:
    """What must stay of the images, as plain JSON."""
    facts = {"image_shape": list(images.shape), "num_images": len(images), "images": images.fingerprint}
    return facts | ({"num_classes": images.num_classes} if images.num_classes else {})


def check_images(images: Images, contract: Mapping[str, Any], root: str) -> None:
    """Raises DataError if these images are not those of the run: on every node they must be the same."""
    for name, value in facts_of(images).items():
        if contract.get(name) != value:
            raise DataError(
                f"data.root={root}: not the images that this run is trained on "
                f"({name}: {contract.get(name)} -> {value})"
            )

"""The contract of a run: what was decided at step 0 and binds every attempt, kept in each checkpoint.

It has three kinds of terms. The images must stay the same. The choices made at step 0 (what `auto` was resolved to,
and where the cosine ends) are obeyed. The circumstances (threads, device, versions, how this machine rounds) are
compared, and a difference is refused or warned of. The config is not part of it: `config.changes` compares configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ddpm_dist.config import Config
from ddpm_dist.data.images import Images
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.training.precision import Numerics, resolve

ARITHMETIC = 1
"""Raise this by one in each version of ddpm_dist that computes other bits from the same config."""

LATER_TERMS: dict[str, Any] = {"arithmetic": 1, "num_classes": 0, "class_names": []}
"""Terms that contracts of the first version lack, with the values that they have for those runs."""

DECIDED_BY = {
    **{name: f"train.{name}" for name in ("precision", "compile", "channels_last", "threads", "device")},
    **{"torch": "", "arithmetic": ""},  # no key of the config decides them
}
"""The key that decides each choice and each circumstance."""

_CANARY_DEPENDS_ON = (
    *("run.seed", "data.batch_size", "model.", "unet2d.", "diffusion.", "loss.", "elastic.mode", "elastic.shards"),
    *("train.precision", "train.matmul_precision", "train.compile", "train.channels_last"),
    *("train.device", "train.threads"),
)
"""Keys, and sections that end in a dot. If one of them is changed, the test batch has another gradient anyhow."""

_WORDS = {
    "decay_steps": "end of the cosine",
    "precision": "precision",
    "compile": "compile",
    "channels_last": "channels_last",
    "threads": "train.threads",
    "device": "kind of device",
    "torch": "version of torch",
    "arithmetic": "arithmetic of ddpm_dist",
    "canary": "gradient of a test batch (this machine rounds differently)",
}


def new_contract(config: Config, images: Images, decay_steps: int | None, device: torch.device) -> dict[str, Any]:
    """The terms of a run that starts now, as plain JSON. `hold_to_contract` adds the canary.

    Args:
        decay_steps: the step at which the cosine ends; None for a constant learning rate.
        device: the device of this rank.
    """
    return {
        **facts_of(images),
        "decay_steps": decay_steps,
        **dataclasses.asdict(resolve(config.train, device)),
        **circumstances(config, device),
    }


def branched_contract(fresh: Mapping[str, Any], parent: Mapping[str, Any], changed: Collection[str]) -> dict[str, Any]:
    """The terms of a branch: where its config is that of its parent, it is bound by its parent's terms, as a resume is.

    `hold_to_contract` then compares the circumstances with these terms, and refuses or warns as on a resume.

    Args:
        fresh: the terms of a new run with the config of the branch.
        parent: the contract in the checkpoint that is branched.
        changed: the keys in which the config of the branch differs.
    """
    before = {**LATER_TERMS, **parent}
    kept = [name for name, key in DECIDED_BY.items() if key not in changed and name in fresh and name in before]
    if not any(key.startswith(_CANARY_DEPENDS_ON) for key in changed):
        kept.append("canary")
    return {**fresh, **{name: before[name] for name in (*kept, "deviations") if name in before}}


def circumstances(config: Config, device: torch.device) -> dict[str, Any]:
    """The facts about this process that its rounding depends on, as plain JSON.

    The number of threads is one of them only if it is meant to stay the same: in bitwise mode, or if the config sets
    it. Otherwise a rank has more threads when there are fewer ranks.
    """
    fixed_threads = config.elastic.mode == "bitwise" or config.train.threads is not None
    return {
        **({"threads": torch.get_num_threads()} if fixed_threads else {}),
        "device": device.type,
        "torch": str(torch.__version__),
        "arithmetic": ARITHMETIC,
    }


def mismatches(contract: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`what: old -> new` for each choice or circumstance that differs from the contract.

    One that the contract does not mention, as an older version wrote it, is no mismatch.
    """
    return [
        f"{_WORDS[name]}: {contract[name]} -> {value}"
        for name, value in now.items()
        if name in _WORDS and name in contract and contract[name] != value
    ]


def hold_to_contract(contract: dict[str, Any], canary: str, ranks: Ranks, config: Config, step: int) -> str:
    """Compare the circumstances of every rank with the contract. Changes the contract. Collective.

    A contract without a canary gets rank 0's. A mismatch that is accepted becomes part of the contract: an entry of
    `deviations` says what changed and from which step on, and later attempts are held to the new terms.

    Args:
        contract: changed in place.
        canary: of this rank; empty on devices where the same gradient may come out in other bits each time.
        step: the step at which this attempt starts.

    Returns:
        a warning for the user, or "".

    Raises:
        ConfigError: some rank would round differently, and elastic.on_mismatch says to fail.
        RankZeroFailed: on the other ranks, for the error that rank 0 reports.
    """
    now, elastic = circumstances(config, ranks.device), config.elastic
    if canary:
        contract.setdefault("canary", ranks.on_rank_zero(lambda should_stop: canary))
        now["canary"] = canary
    found = mismatches(contract, now)

    def refuse() -> None:
        if found and elastic.fails_on_mismatch:
            raise ConfigError(
                f"on this machine the run cannot go on with the same bits: {'; '.join(found)} "
                "(set elastic.on_mismatch=warn to go on all the same)"
            )

    ranks.all_succeed(refuse)
    ours, *others = ranks.gather(len(found))
    who = [str(rank) for rank, count in enumerate(others, start=1) if count]
    if not ours and not who:
        return ""
    where = f" (on rank {', '.join(['0'] * bool(ours) + who)})" if who else ""
    changed = "; ".join(found) or "see those machines"
    contract["deviations"] = [*contract.get("deviations", []), f"from step {step} on{where}: {changed}"]
    contract.update({name: value for name, value in now.items() if name in contract})
    return f"warning: from here on results may be rounded differently{where}: {changed}"


def numerics_of(contract: Mapping[str, Any]) -> Numerics:
    """The choices that were made at step 0."""
    return Numerics(**{item.name: contract[item.name] for item in dataclasses.fields(Numerics)})


def facts_of(images: Images) -> dict[str, Any]:
    """The facts about the images that must stay the same, as plain JSON."""
    return {
        "image_shape": list(images.shape),
        "num_images": len(images),
        "num_classes": images.num_classes,
        "class_names": list(images.class_names),
        "images": images.fingerprint,
    }


def check_images(images: Images, contract: Mapping[str, Any], root: str) -> None:
    """Check that these are the images of the run; they must be the same on every node.

    Args:
        root: data.root, for the message.

    Raises:
        DataError: they are not; the message says which fact differs.
    """
    for name, value in facts_of(images).items():
        if contract[name] != value:
            raise DataError(
                f"data.root={root}: not the images that this run is trained on ({name}: {contract[name]} -> {value}); "
                "give those images to go on, or another run.name to start anew"
            )

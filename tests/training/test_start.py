"""Runs that start from others' weights (init.weights), and branches of other runs (init.run), by the real command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import committed, differences, final_state, metrics, start, train

from ddpm_dist import export
from ddpm_dist.run.files import sha256_of

RUN = ("checkpoint.every=4", "optim.lr=1e-2", "elastic.mode=bitwise", "ema.more=[0.9]", "checkpoint.ema_snapshots=4")
LEARNED = ("step", "model", "ema", "averages", "optimizer", "scaler", "window")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, with checkpoints at 4, 8 and 12."""
    return train(1, tmp_path_factory.mktemp("runs"), *RUN, "train.max_steps=12", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def onward(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, gone on to step 16."""
    copy = tmp_path_factory.mktemp("onward") / "run"
    shutil.copytree(parent, copy)
    return train(1, copy.parent, *RUN, "train.max_steps=16", "checkpoint.keep_last=9")


def learned(run: Path, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint of a run says of learning; by default the newest one."""
    name = f"step-{committed(run)[-1] if step is None else step:08d}.pt"
    state = torch.load(run / "checkpoints" / name, weights_only=True)
    return {part: state.get(part) for part in LEARNED}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_branch_under_the_same_config_is_the_run_gone_on(
    tmp_path: Path, parent: Path, onward: Path, ranks: int
) -> None:
    """Also where it is stopped in between, and the run that it branches is not there any more."""
    source = tmp_path / "parent"
    shutil.copytree(parent, source)
    branching = (*RUN, f"init.run={source}@8")
    run = train(ranks, tmp_path, *branching, "train.max_steps=13", name="branch")
    shutil.rmtree(source)
    train(1, tmp_path, *branching, "train.max_steps=16", name="branch")
    assert differences(learned(run), learned(onward)) == []
    lines = [{name: line[name] for name in ("step", "loss", "lr", "grad_norm", "epoch")} for line in metrics(run)]
    theirs = {line["step"]: line for line in metrics(onward)}
    assert lines == [{name: theirs[step][name] for name in lines[0]} for step in range(9, 17)]
    contract = final_state(run)["contract"]
    (lineage,) = contract.pop("lineage")
    assert (lineage["key"], lineage["source"], lineage["step"]) == ("init.run", "parent", 8)
    assert contract == final_state(onward)["contract"]
    kept = [sorted(path.name for path in (each / "ema_snapshots").iterdir()) for each in (run, onward)]
    assert kept[0] == kept[1]


def test_a_branch_obeys_its_own_optimizer(tmp_path: Path, parent: Path) -> None:
    """Its first update is Adam's of the new options, with the moments of the run that it branches.

    Kingma & Ba 2015, algorithm 1, in float64, with the gradient that the new first moment implies.
    """
    options = ("optim.lr=1e-3", "optim.beta1=0.5", "optim.beta2=0.9", "optim.eps=1e-3")
    train(1, tmp_path, *RUN, *options, f"init.run={parent}@8", "train.max_steps=9")
    before, after = learned(parent, 8), learned(tmp_path / "run", 9)
    (group,) = after["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.5, 0.9), 1e-3)
    assert [line["lr"] for line in metrics(tmp_path / "run")] == [1e-3]
    for number, name in enumerate(before["model"]):
        old, new = (each["optimizer"]["state"][number] for each in (before, after))
        gradient = 2 * new["exp_avg"].double() - old["exp_avg"].double()
        second = 0.9 * old["exp_avg_sq"].double() + 0.1 * gradient.square()
        step = (new["exp_avg"].double() / (1 - 0.5**9)) / ((second / (1 - 0.9**9)).sqrt() + 1e-3)
        expected = before["model"][name].double() - 1e-3 * step
        torch.testing.assert_close(after["model"][name].double(), expected, rtol=1e-5, atol=2e-7)


def test_a_branch_says_what_is_different_and_may_keep_further_averages(tmp_path: Path, parent: Path) -> None:
    changed = ("optim.name=adamw", "optim.weight_decay=0.1", "data.batch_size=16", "ema.more=[0.5]")
    with start(1, tmp_path, *RUN, *changed, f"init.run={parent}", "train.max_steps=13", "run.seed=5") as job:
        assert job.wait() == [0]
        output = job.output()
    assert f"init.run: a branch of step 12 of {parent} (sha256 " in output
    for change in ("optim.name: adam -> adamw", "data.batch_size: 8 -> 16", "run.seed: 0 -> 5"):
        assert f"init.run: changed {change}\n" in output
    assert "attempt 1 starts at step 12 of 13" in output
    state, weights = learned(tmp_path / "run", 12), learned(parent, 12)
    assert differences(state["averages"]["ema-0.5"], weights["model"]) == []
    assert differences(state["ema"], weights["ema"]) == []


def test_weights_alone_start_a_new_run(tmp_path: Path, parent: Path) -> None:
    source = tmp_path / "parent"
    shutil.copytree(parent, source)
    arguments = (*RUN, f"init.weights={source}@8", "init.average=ema-0.9", "train.max_steps=6")
    undisturbed = train(1, tmp_path, *arguments, name="undisturbed")
    first, wanted = learned(undisturbed, 0), learned(parent, 8)["averages"]["ema-0.9"]
    for name, state in {"model": first["model"], "ema": first["ema"], **first["averages"]}.items():
        assert differences(dict(state), dict(wanted)) == [], name
    assert first["optimizer"]["state"] == {}
    (lineage,) = final_state(undisturbed)["contract"]["lineage"]
    assert (lineage["key"], lineage["step"], lineage["weights"]) == ("init.weights", 8, "ema-0.9")
    assert [line["step"] for line in metrics(undisturbed)] == [1, 2, 3, 4, 5, 6]

    train(1, tmp_path, *arguments, "train.max_steps=3", name="stopped")
    (tmp_path / "stopped" / "checkpoints" / "step-00000003.json").unlink()  # as after a kill at the second step
    (tmp_path / "stopped" / "status.json").unlink()
    shutil.rmtree(source)
    assert differences(learned(train(2, tmp_path, *arguments, name="stopped")), learned(undisturbed)) == []
    with start(1, tmp_path, *RUN, f"init.weights={source}@4", "train.max_steps=9", name="stopped") as job:
        assert job.wait() == [78]
        assert "init.weights: " in job.output()


@pytest.mark.parametrize(("form", "name"), [("safetensors", "weights.safetensors"), ("diffusers", "folder")])
def test_exported_weights_come_back_to_the_bit(tmp_path: Path, parent: Path, form: str, name: str) -> None:
    pytest.importorskip("safetensors")
    out = tmp_path / name
    assert export.main([str(parent), "--to", form, "--out", str(out)]) == 0
    with start(1, tmp_path, *RUN, f"init.weights={out}", "train.max_steps=1") as job:
        assert job.wait() == [0]
        number = len(learned(parent)["model"])
        assert f"init.weights: {number} of {number} weights of the network are {out}" in job.output()
    assert differences(dict(learned(tmp_path / "run", 0)["model"]), dict(learned(parent)["ema"])) == []


def test_what_does_not_match_by_name_is_said(tmp_path: Path, parent: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {name: weight.contiguous() for name, weight in learned(parent)["model"].items()}
    left_out = list(weights)[-1]
    del weights[left_out]
    safetensors.save_file({**weights, "head": torch.zeros(3)}, tmp_path / "some.safetensors")
    with start(1, tmp_path, *RUN, f"init.weights={tmp_path}/some.safetensors", "train.max_steps=1") as job:
        assert job.wait() == [0]
        output = job.output()
    assert f"1 not in the source stay random: {left_out}\n" in output
    assert "1 of the source are not used: head\n" in output


def rewrite(run: Path, terms: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    """Give step 8 other terms of the contract, and another config, as if another machine had trained it."""
    path = run / "checkpoints" / "step-00000008.pt"
    state = torch.load(path, weights_only=True)
    state["contract"] |= terms
    state["config"] |= config or {}
    torch.save(state, path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest |= {"size": path.stat().st_size, "sha256": sha256_of(path), "contract": state["contract"]}
    path.with_suffix(".json").write_text(json.dumps(manifest))


def test_a_branch_is_held_to_the_circumstances_of_its_parent(tmp_path: Path, parent: Path) -> None:
    """As a resume is, unless the config of the branch has another value of the key that decides them."""
    terms = {"device": "cuda", "torch": "2.0.0", "canary": "00"}
    path = tmp_path / "elsewhere"
    shutil.copytree(parent, path)
    rewrite(path, terms)
    branching = (*RUN, f"init.run={path}@8", "train.max_steps=9")
    with start(1, tmp_path, *branching) as job:
        assert job.wait() == [78]
        output = job.output()
    assert "on this machine the run cannot go on with the same bits: kind of device: cuda -> cpu; " in output
    assert "version of torch: 2.0.0 -> " in output
    assert "gradient of a test batch (this machine rounds differently): 00 -> " in output
    rewrite(path, terms, {"train.device": "cuda"})
    with start(1, tmp_path, *branching, "elastic.on_mismatch=warn", name="changed") as job:
        assert job.wait() == [0]
        output = job.output()
    assert "init.run: there is another kind of device: cuda -> cpu\n" in output
    assert "warning: from here on results may be rounded differently: version of torch: 2.0.0 -> " in output
    contract = final_state(tmp_path / "changed")["contract"]
    (deviation,) = contract["deviations"]
    assert deviation.startswith("from step 8 on: version of torch: 2.0.0 -> ")
    assert (contract["device"], contract["torch"]) == ("cpu", str(torch.__version__))


@pytest.mark.parametrize(("options", "kept"), [((), True), (("train.channels_last=true",), False)])
def test_a_branch_keeps_what_auto_was_decided_to_be(
    tmp_path: Path, parent: Path, options: tuple[str, ...], kept: bool
) -> None:
    path = tmp_path / "elsewhere"
    shutil.copytree(parent, path)
    rewrite(path, {"channels_last": False, "canary": "00"})
    branching = (*RUN, "elastic.on_mismatch=warn", *options, f"init.run={path}@8", "train.max_steps=9")
    with start(1, tmp_path, *branching) as job:
        assert job.wait() == [0]
        output = job.output()
    assert final_state(tmp_path / "run")["contract"]["channels_last"] is not kept
    assert ("init.run: there is another channels_last: False -> True\n" in output) is not kept
    assert ("gradient of a test batch" in output) is kept, "the test batch has another gradient in another format"


def test_after_a_kill_before_its_first_checkpoint_a_run_starts_from_the_same_step(tmp_path: Path, parent: Path) -> None:
    """Though the run that it branches has trained on meanwhile."""
    source, run = tmp_path / "parent", tmp_path / "run"
    shutil.copytree(parent, source)
    for path in (source / "checkpoints").glob("step-00000012.*"):
        path.rename(tmp_path / path.name)
    train(1, tmp_path, *RUN, f"init.run={source}", "train.max_steps=9")
    shutil.rmtree(run / "checkpoints")  # as after a kill before the first one
    (run / "status.json").unlink()
    for path in tmp_path.glob("step-00000012.*"):
        path.rename(source / "checkpoints" / path.name)
    with start(1, tmp_path, *RUN, f"init.run={source}", "train.max_steps=13") as job:
        assert job.wait() == [0]
        assert f"init.run: a branch of step 8 of {source}" in job.output()
    shutil.rmtree(run / "checkpoints")
    (run / "status.json").unlink()
    (source / "checkpoints" / "step-00000008.json").unlink()
    with start(1, tmp_path, *RUN, f"init.run={source}", "train.max_steps=13") as job:
        assert job.wait() == [65]
        assert f"this run began from step 8 of {source}" in job.output()

"""Runs that keep several averages: stopped or not, on one rank or two, they end with the same ones and snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import call_train, differences, final_state, start, state_differences, train

from ddpm_dist import build, sample
from ddpm_dist.config import load_config
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.loading import load_run
from ddpm_dist.models.averages import PowerEMA
from ddpm_dist.training import assembly

RUN = (
    *("train.max_steps=40", "checkpoint.every=10", "optim.lr=1e-2", "elastic.mode=bitwise"),
    *("ema.more=[0.9,0.5]", "checkpoint.ema_snapshots=2"),
)
DIRECT = (0.06, 0.08, 0.12)


def call_with_direct_averages(argv: list[str]) -> int:
    """The train command, which also keeps averages of the widths that the tests compute from snapshots."""
    usual = build.build_averages
    assembly.build_averages = lambda config, model: {  # type: ignore[attr-defined]
        **usual(config, model),
        **{f"direct-{width}": PowerEMA(model, width) for width in DIRECT},
    }
    return call_train(argv)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("runs"), *RUN, function=call_with_direct_averages)


def snapshots(run: Path) -> dict[str, object]:
    """The content of each file in ema_snapshots/; a manifest without the hash, since a zip file has dates in it."""
    found: dict[str, object] = {}
    for path in sorted((run / "ema_snapshots").iterdir()):
        if path.suffix == ".pt":
            found[path.name] = torch.load(path, weights_only=True)
        else:
            found[path.name] = {name: value for name, value in json.loads(path.read_text()).items() if name == "step"}
    return found


def test_what_is_kept_has_the_documented_names(undisturbed: Path) -> None:
    state = final_state(undisturbed)
    direct = {f"direct-{width}" for width in DIRECT}
    assert set(state["averages"]) == {"ema-0.9", "ema-0.5", "power-0.05", "power-0.1", *direct}
    names = [f"step-{step:08d}.{suffix}" for step in range(2, 41, 2) for suffix in ("json", "pt")]
    assert sorted(path.name for path in (undisturbed / "ema_snapshots").iterdir()) == names
    loaded = load_run(undisturbed, weights="ema-0.5").network.state_dict()
    assert differences(dict(loaded), dict(state["averages"]["ema-0.5"])) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_killed_has_the_same_averages_and_snapshots(
    tmp_path: Path, undisturbed: Path, ranks: int
) -> None:
    train(1, tmp_path, *RUN, "train.max_steps=14", function=call_with_direct_averages)
    # As after a kill: the checkpoint of step 14 and what was written since step 10 did not come to be.
    for name in ("checkpoints/step-00000014", "ema_snapshots/step-00000012"):
        (tmp_path / "run" / f"{name}.json").unlink()
    (tmp_path / "run" / "status.json").unlink()
    resumed = train(ranks, tmp_path, *RUN, function=call_with_direct_averages)
    assert state_differences(undisturbed, resumed) == []
    assert differences(final_state(undisturbed)["averages"], final_state(resumed)["averages"]) == []
    assert differences(snapshots(undisturbed), snapshots(resumed)) == []


@pytest.mark.parametrize("width", DIRECT)
def test_an_average_from_snapshots_is_the_directly_kept_one(undisturbed: Path, width: float) -> None:
    """To 1e-3 of its norm, also where the newest checkpoint lies between two snapshots."""
    for step in (None, 30):
        solved = load_run(undisturbed, step, weights=f"power-{width}").network.state_dict()
        direct = load_run(undisturbed, step, weights=f"direct-{width}").network.state_dict()
        off = sum(float((solved[name].double() - direct[name].double()).square().sum()) for name in direct)
        assert off**0.5 < 1e-3 * sum(float(value.double().square().sum()) for value in direct.values()) ** 0.5


def test_a_name_that_is_not_there_is_refused_with_those_that_are(undisturbed: Path, tmp_path: Path) -> None:
    there = "model, ema-0.9, ema-0.5, power-0.05, power-0.1"
    with pytest.raises(DataError) as refused:
        load_run(undisturbed, weights="ema-0.99")
    for name in there.split(", "):
        assert name in str(refused.value)
    with pytest.raises(DataError, match=r"above 0 and at most 0\.28"):
        load_run(undisturbed, weights="power-0.5")
    damaged = undisturbed / "ema_snapshots" / "step-00000008.pt"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"step-00000008\.pt: its sha256 .* remove"):
        load_run(undisturbed, weights="power-0.07")
    damaged.write_bytes(whole)


def test_sample_draws_from_any_weights_and_the_name_of_the_grid_says_which(undisturbed: Path) -> None:
    asked = {"ema": [], "model": ["--weights", "model"], "power-0.07": ["--ema", "0.07"]}
    for name, flags in asked.items():
        assert sample.main([str(undisturbed), "--num", "1", "--steps", "1", *flags]) == 0
        grid = f"ddim{f'-{name}' if flags else ''}-seed0-step-00000040.png"
        assert (undisturbed / "samples" / grid).exists()
    grids = [path.read_bytes() for path in (undisturbed / "samples").glob("ddim*.png")]
    assert len(set(grids)) == len(grids) == 3


@pytest.mark.parametrize("change", ["ema.more=[0.9]", "ema.more=[0.5,0.9]", "checkpoint.ema_snapshots=8"])
def test_a_run_keeps_the_averages_that_it_was_started_with(undisturbed: Path, change: str) -> None:
    with start(1, undisturbed.parent, *RUN, change, "train.max_steps=50") as job:
        assert job.wait() == [78]
        assert f"was started with another config: {change.split('=')[0]}: " in job.output()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ema.more=[0.9,0.9]"], "each number may stand there once"),
        (["ema.more=[1.0]"], "ema.more"),
        (["ema.widths=[]", "checkpoint.ema_snapshots=10"], "needs the widths to keep"),
        (["preview.weights=ema-0.9"], "it keeps ema "),
    ],
)
def test_values_that_cannot_work_are_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(None, arguments)
    load_config(None, ["ema.more=[0.9]", "preview.weights=ema-0.9"])

"""`python -m ddpm_dist.export`, as a user calls it, on tiny trained runs: what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shlex
import sys
from pathlib import Path

import pytest
from harness import differences, final_state, metrics, snapshot, train
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm_dist import sample
from ddpm_dist.config import from_flat, load_config
from ddpm_dist.errors import DataError
from ddpm_dist.export import main
from ddpm_dist.exporting.shareable import shareable_config
from ddpm_dist.loading import load_run
from ddpm_dist.run.weights_file import read_weights_file, write_weights_file

QUICK = (
    *("data.image_size=8", "diffusion.num_timesteps=20", "train.max_steps=3", "checkpoint.every=2"),
    *("preview.num_images=4", "preview.steps=4", "tracking.uri=https://server.example", "ema.decay=0.5"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("export"), *QUICK)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_dist.parallel.environment.cpu_threads", lambda world: 1)


def export(run: Path, *arguments: str) -> None:
    assert main([str(run), *arguments]) == 0


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    out = run.parent / "weights.safetensors"
    export(run, "--to", "safetensors", "--out", str(out))
    return out


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    out = run.parent / "folder"
    export(run, "--to", "diffusers", "--out", str(out))
    return out


# safetensors


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_weights_come_back_to_the_bit(run: Path, tmp_path: Path, weights: str) -> None:
    out = tmp_path / "weights.safetensors"
    export(run, "--to", "safetensors", "--out", str(out), "--weights", weights)
    loaded = load_run(out)
    assert differences(dict(loaded.network.state_dict()), dict(final_state(run)[weights])) == []
    assert (loaded.step, loaded.weights) == (3, weights)


def test_the_file_says_what_it_is_and_names_no_place_of_the_run(run: Path, file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert header["step"] == "3"
    assert header["weights"] == "ema"
    assert header["ddpm_dist.format"] == "1"
    assert header["source_sha256"] == json.loads((run / "checkpoints/step-00000003.json").read_text())["sha256"]
    assert json.loads(header["contract"]) == final_state(run)["contract"]
    config = json.loads(header["config"])
    assert config["diffusion.num_timesteps"] == 20
    assert "server.example" not in str(header)
    assert str(run.parent) not in str(header)


def test_a_step_can_be_chosen(run: Path, tmp_path: Path) -> None:
    export(run, "--to", "safetensors", "--out", str(tmp_path / "a.safetensors"), "--step", "2")
    assert load_run(tmp_path / "a.safetensors").step == 2


def test_sample_draws_the_same_images_from_the_file_as_from_the_run(run: Path, file: Path, tmp_path: Path) -> None:
    for name, path in {"run": run, "file": file}.items():
        arguments = ["--num", "2", "--sampler", "ddpm", "--out", str(tmp_path / f"{name}.npz")]
        assert sample.main([str(path), *arguments]) == 0
    assert (tmp_path / "run.npz").read_bytes() == (tmp_path / "file.npz").read_bytes()


# diffusers


def test_the_card_says_what_the_model_is_and_names_no_licence(run: Path, folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert "license" not in card.data.to_dict()
    assert "licen" not in card.text.lower()
    shown = {row[1]: row[2] for row in re.findall(r"(\| `([^`]+)` \| `([^`]+)` \|)", card.text)}
    last = metrics(run)[-1]
    contract = final_state(run)["contract"]
    assert json.loads(shown["loss"]) == last["loss"]
    assert json.loads(shown["images"]) == contract["images"]
    assert json.loads(shown["image_shape"]) == [1, 8, 8]
    assert json.loads(shown["diffusion.num_timesteps"]) == 20
    assert "step 3" in card.text
    assert "data set `mnist5k`" in card.text
    assert (folder / "grid.png").read_bytes() == (run / "samples/step-00000003.png").read_bytes()
    assert "server.example" not in card.content
    assert str(run.parent) not in card.content
    (command,) = re.findall(r"python -m ddpm_dist.train (.*)", card.text)
    assert load_config(None, [*shlex.split(command), "run.root=."]) == from_flat(
        {**shareable_config(load_run(run).config), "run.root": "."}
    )


def test_a_licence_that_the_user_gives_is_named(run: Path, tmp_path: Path) -> None:
    export(run, "--to", "diffusers", "--out", str(tmp_path / "new" / "folder"), "--license", "cc-by-4.0")
    assert ModelCard.load(tmp_path / "new" / "folder" / "README.md").data.license == "cc-by-4.0"


def test_other_weights_get_a_grid_of_their_own(run: Path, tmp_path: Path) -> None:
    export(run, "--to", "diffusers", "--out", str(tmp_path / "folder"), "--weights", "model")
    assert (tmp_path / "folder/grid.png").read_bytes() != (run / "samples/step-00000003.png").read_bytes()
    state = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert differences(state, dict(final_state(run)["model"])) == []


# mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "onnx", "--out", "{}/new"], 78, "--to onnx: expected one of safetensors, diffusers"),
        (["--to", "diffusers", "--out", "{}"], 78, "exists already, and nothing is overwritten"),
        (["--to", "safetensors", "--out", "{}/weights"], 78, "ends with .safetensors, like {}/weights.safetensors"),
        (["--to", "safetensors", "--out", "{}/a.safetensors", "--license", "mit"], 78, "--license: stands in the card"),
        (["--to", "safetensors", "--out", "{}/file/a.safetensors"], 78, "cannot be written ({}/file: File exists)"),
        (["--to", "diffusers", "--out", "{}/new", "--weights", "best"], 65, "no weights 'best'; there are: ema, model"),
        (["--to", "diffusers", "--out", "{}/new", "--step", "9"], 65, "no checkpoint of step 9; there are: 2, 3"),
        (["--to", "diffusers"], 78, "required: --out"),
    ],
)
def test_mistakes_get_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    assert main([str(run), *(word.format(tmp_path) for word in arguments)]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words.format(*[tmp_path] * 2) in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("to", ["safetensors", "diffusers"])
def test_a_missing_package_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    for package in ("safetensors", "safetensors.torch", "diffusers"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main([str(run), "--to", to, "--out", str(tmp_path / "a.safetensors")]) == 78
    assert f"needs the {to} package; pip install 'ddpm_dist[diffusers]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["safetensors", "diffusers"])
def test_what_cannot_be_written_whole_is_not_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    """As on a full disk: no file of this process may grow beyond 20 kB meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = main([str(run), "--to", to, "--out", str(tmp_path / "a.safetensors")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 78
    assert line.startswith(f"error: --out {tmp_path}/a.safetensors: cannot be written (")
    assert "File too large" in line
    assert list(tmp_path.iterdir()) == []


def test_a_weights_file_may_not_choose_code_to_run(file: Path, tmp_path: Path) -> None:
    content = read_weights_file(file)
    path = tmp_path / "foreign.safetensors"
    write_weights_file(path, dataclasses.replace(content, config={**content.config, "model.name": "antigravity:run"}))
    with pytest.raises(DataError, match="may not choose to run; give the run directory instead"):
        load_run(path)
    assert "antigravity" not in sys.modules

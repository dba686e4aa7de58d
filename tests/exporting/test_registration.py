"""`--register`: MLflow loads and calls the network without ddpm_dist, and shows it with the run that it is from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_runs import TINY_UNET, make_run

from ddpm_dist.export import main
from ddpm_dist.loading import load_run
from ddpm_dist.tracking.destination import prepare_client

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with labels, registered as the first version of digits in the database beside it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", *TINY_UNET, "model.class_labels=true", num_classes=3)
    out = run.parent / "a.safetensors"
    assert main([str(run), "--to", "safetensors", "--out", str(out), "--register", "digits"]) == 0
    return run


@pytest.fixture
def tracking(registered: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a person sets to use the models of this store."""
    prepare_client()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{registered.parent}/mlflow.db")
    return uri


@pytest.mark.parametrize("pickles", ["true", "false"])
def test_mlflow_loads_and_calls_the_network(
    registered: Path, tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickles: str
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", pickles)
    for name in [name for name in sys.modules if name.startswith("ddpm_dist.models")]:
        monkeypatch.setitem(sys.modules, name, None)
    model = mlflow.pytorch.load_model("models:/digits/1", dst_path=str(tmp_path))
    with np.load(tmp_path / "extra_files" / "example.npz") as file:
        example = {name: torch.from_numpy(array) for name, array in file.items()}
    assert list(example) == ["x", "t", "labels", "output"]
    expected = example.pop("output")
    assert torch.equal(model(*example.values()), expected)
    more = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in example.items()}
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.allclose(model(*more.values()), load_run(registered).network(**more), atol=1e-6)


def test_the_model_has_signature_and_requirements_and_belongs_to_its_run(registered: Path, tracking: str) -> None:
    import mlflow

    client: Any = mlflow.MlflowClient()
    version = client.get_model_version("digits", "1")
    run = client.get_run(version.run_id)
    assert run.data.tags["ddpm_dist.directory"] == str(registered)
    assert [output.step for output in run.outputs.model_outputs] == [5]
    assert run.info.status != "RUNNING"
    info = mlflow.models.get_model_info("models:/digits/1")
    inputs = {spec.name: (spec.type.name, spec.shape) for spec in info.signature.inputs}
    assert inputs == {"x": ("float32", (-1, 1, 8, 8)), "t": ("int64", (-1,)), "labels": ("int64", (-1,))}
    assert [spec.shape for spec in info.signature.outputs] == [(-1, 1, 8, 8)]
    requirements = Path(mlflow.artifacts.download_artifacts("models:/digits/1/requirements.txt")).read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--register", "a/b"], 78, "--register a/b: expected a name of letters, digits, blanks, _, . and -"),
        (["--register", "digits"], 70, "MLflow did not take the model; what --out names is written (http://127"),
    ],
)
def test_what_mlflow_does_not_take_is_said_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run, out = make_run(tmp_path / "run", *TINY_UNET), tmp_path / "a.safetensors"
    assert main([str(run), "--to", "safetensors", "--out", str(out), *arguments]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert out.exists() == (code == 70)

"""What MLflow is told about a run beside its curves is true, and what is not known is left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from handmade import make_run

from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking import description
from ddpm_dist.tracking.address import how_to_look
from ddpm_dist.tracking.description import MODIFIED, commit_of, dataset_of, describe, surroundings, user_of
from ddpm_dist.tracking.destination import KIND_TAG, Destination, prepare_client
from ddpm_dist.tracking.shipped import Shipped
from ddpm_dist.tracking.shipper import Shipper

CONTRACT = {"images": "840b585a6271bb12b29f4f1a39455edc", "num_images": 5000, "image_shape": [1, 28, 28]}

# Which commit


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ("git", *who, "-C", str(folder), *words), capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if not shutil.which("git"):
        pytest.skip("no git here; Debian: apt-get install git")
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("1\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "--quiet", "--message", "first")
    git(folder, "tag", "-m", "a tag is not a commit", "v1")
    return folder


def test_commit_is_the_one_checked_out_and_says_whether_files_differ_from_it(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert commit_of(checkout) == commit
    (checkout / "runs").mkdir()  # files that git does not know are no code
    assert commit_of(checkout) == commit
    (checkout / "code.py").write_text("2\n")
    assert commit_of(checkout) == commit + MODIFIED


def test_package_inside_a_repository_of_somebody_else_has_no_commit(checkout: Path) -> None:
    installed = checkout / "venv" / "site-packages"
    installed.mkdir(parents=True)
    assert commit_of(installed) is None


@pytest.mark.parametrize("trouble", ["no git", "damaged", "git hangs", "empty"])
def test_commit_is_left_out_where_git_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    folder, programs = tmp_path / "checkout", tmp_path / "bin"
    (folder / ".git").mkdir(parents=True)
    programs.mkdir()
    if trouble == "git hangs":
        (programs / "git").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
        (programs / "git").chmod(0o755)
    if trouble in ("no git", "git hangs"):
        monkeypatch.setenv("PATH", str(programs))
    if trouble == "empty" and shutil.which("git"):
        git(folder, "init", "--quiet")
    monkeypatch.setattr(description, "GIT_SECONDS", 1.0)
    monkeypatch.setattr(description, "CHECKOUT", folder)
    assert commit_of(folder) is None
    assert "commit" not in surroundings()


# Who, what, on which images


def test_user_is_the_owner_of_the_run_even_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_run(tmp_path, "run")
    assert user_of(directory) == directory.config_file.owner()

    def nameless(self: Path) -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(type(directory.config_file), "owner", nameless)
    assert user_of(directory) == str(os.getuid())


def test_description_says_where_the_run_lies_and_how_to_go_on(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a folder", "run")
    origin = {"host": "node17", "working_directory": "/work place", "commit": "a" * 40 + MODIFIED}
    said = describe(directory.read_config(), directory, origin)
    path = f"{tmp_path}/a folder/run"
    assert f"`{path}` on host `node17`" in said
    assert f"`cd '/work place' && python -m ddpm_dist.train --config '{path}/config.yaml'`" in said
    assert f"`python -m ddpm_dist.sample '{path}'`" in said
    assert f"commit `{'a' * 40}`, with changes that were not committed" in said
    little = describe(directory.read_config(), directory, {})
    assert "host" not in little
    assert "cd " not in little
    assert "commit" not in little


def test_description_says_what_the_run_started_from(tmp_path: Path) -> None:
    for key, words in (("init.run", "A branch of: `runs/a@8`"), ("init.weights", "the weights: `runs/a@8`")):
        directory = make_run(tmp_path, key, f"{key}=runs/a@8")
        assert words in describe(directory.read_config(), directory, {})


def write_manifest(directory: RunDirectory, step: int, content: str) -> None:
    (directory.checkpoints / f"step-{step:08d}.json").write_text(content)


def test_images_are_those_of_the_newest_readable_manifest(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "run", "data.root=images")
    config = directory.read_config()
    assert dataset_of(config, directory, {}) is None
    write_manifest(directory, 30, "{torn")
    write_manifest(directory, 40, json.dumps({"contract": {"seed": 0}}))
    assert dataset_of(config, directory, {}) is None
    write_manifest(directory, 20, json.dumps({"contract": CONTRACT}))
    found = dataset_of(config, directory, {"working_directory": "/srv/project"})
    assert found is not None
    assert (found.name, found.digest, found.source) == ("mnist5k", CONTRACT["images"], "/srv/project/images")
    assert found.profile == {"num_rows": 5000, "image_shape": [1, 28, 28], "num_elements": 5000 * 28 * 28}


# In MLflow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare_client()
    return tmp_path_factory.mktemp("runs")


def shipped_run(directory: RunDirectory) -> Any:
    from mlflow import MlflowClient

    noted = json.loads(directory.mlflow_file.read_text())
    return MlflowClient(f"sqlite:///{directory.path.parent}/mlflow.db").get_run(noted["run_id"])


def client_of(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root}/mlflow.db")


@pytest.mark.slow
def test_lineage_is_a_tag_with_source_step_and_hash(root: Path) -> None:
    lineage = [{"key": "init.run", "source": "a", "step": 8, "sha256": "d" * 64}]
    directory = make_run(root, "branch")
    write_manifest(directory, 20, json.dumps({"contract": {**CONTRACT, "lineage": lineage}}))
    Shipper(directory).ship("finished")
    assert json.loads(shipped_run(directory).data.tags["ddpm_dist.lineage"]) == lineage


@pytest.mark.slow
def test_dataset_follows_with_the_first_checkpoint_and_only_once(root: Path) -> None:
    directory = make_run(root, "dataset", state="running")
    Shipper(directory).ship("running")
    assert shipped_run(directory).inputs.dataset_inputs == []
    write_manifest(directory, 20, json.dumps({"contract": CONTRACT}))
    Shipper(directory).ship("running")
    noted = json.loads(directory.mlflow_file.read_text())
    directory.mlflow_file.write_text(json.dumps(noted | {"dataset": None}))  # it died before it could note it
    Shipper(directory).ship("finished")
    inputs = shipped_run(directory).inputs.dataset_inputs
    assert [(each.dataset.name, each.dataset.digest) for each in inputs] == [("mnist5k", CONTRACT["images"])]
    assert [(tag.key, tag.value) for tag in inputs[0].tags] == [("mlflow.data.context", "training")]
    assert json.loads(inputs[0].dataset.profile)["num_rows"] == 5000


def test_run_of_the_first_version_is_gone_on_with_and_described(root: Path) -> None:
    directory = make_run(root, "old", state="running")
    Shipper(directory).ship("running")
    run_id, client = shipped_run(directory).info.run_id, client_of(root)
    for name in ("mlflow.user", "mlflow.source.name", "mlflow.note.content"):
        client.delete_tag(run_id, name)
    noted = json.loads(directory.mlflow_file.read_text())
    for name in ("experiment_id", "dataset", "origin"):
        del noted[name]
    directory.mlflow_file.write_text(json.dumps(noted))
    Shipper(directory, {"commit": "b" * 40}).ship("finished")
    run = shipped_run(directory)
    assert run.info.run_id == run_id
    assert run.data.tags["mlflow.user"] == user_of(directory)
    assert run.data.tags["mlflow.source.git.commit"] == "b" * 40
    assert f"/experiments/{run.info.experiment_id}/runs/{run_id}?" in how_to_look(directory)


def test_what_a_person_wrote_stays_and_other_code_of_a_later_attempt_is_a_tag(root: Path) -> None:
    directory = make_run(root, "noted", state="running")
    Shipper(directory, {"commit": "a" * 40}).ship("running")
    client, run = client_of(root), shipped_run(directory)
    client.set_tag(run.info.run_id, "mlflow.note.content", "the one for the paper")
    client.set_experiment_tag(run.info.experiment_id, KIND_TAG, "genai_development")
    Shipper(directory, {"commit": "c" * 40}).ship("finished")
    tags = shipped_run(directory).data.tags
    assert tags["mlflow.note.content"] == "the one for the paper"
    assert tags["mlflow.source.git.commit"] == "a" * 40
    assert tags["changed.commit"] == "c" * 40
    assert client.get_experiment(run.info.experiment_id).tags[KIND_TAG] == "genai_development"


def test_experiment_is_marked_as_training_also_where_it_was_there_before(root: Path) -> None:
    first = make_run(root, "marked")
    Shipper(first).ship("finished")
    client, experiment = client_of(root), shipped_run(first).info.experiment_id
    assert client.get_experiment(experiment).tags[KIND_TAG] == "custom_model_development"
    existing = client.create_experiment("existing", artifact_location=(root / "files").as_uri())
    Shipper(make_run(root, "second", "tracking.experiment=existing")).ship("finished")
    assert client.get_experiment(existing).tags[KIND_TAG] == "custom_model_development"


def test_run_is_delivered_where_the_experiment_may_not_be_tagged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def forbid(*_: object) -> None:
        raise PermissionError("403")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", forbid)
    directory = make_run(root, "forbidden")
    Shipper(directory).ship("finished")
    assert shipped_run(directory).info.status == "FINISHED"


def test_experiment_that_another_run_has_just_made_is_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    Shipper(make_run(root, "raced")).ship("finished")
    answers, real = [None], MlflowClient.get_experiment_by_name

    def too_early(self: Any, name: str) -> Any:
        return answers.pop() if answers else real(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", too_early)
    destination = Destination(f"sqlite:///{root}/mlflow.db", lambda sign: None)
    assert destination.experiment("raced", None) == client_of(root).get_experiment_by_name("raced").experiment_id


# The way there


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (None, "mlflow ui --backend-store-uri sqlite:///{root}/mlflow.db then open http://127.0.0.1:5000/#{run}"),
        ("sqlite:////tmp/a b.db", "mlflow ui --backend-store-uri 'sqlite:////tmp/a b.db' then open "
         "http://127.0.0.1:5000/#{run}"),
        ("http://mlflow.example:8080/", "http://mlflow.example:8080/#{run}"),
        ("https://me:secret@mlflow.example/prefix", "https://mlflow.example/prefix/#{run}"),
        ("postgresql://me:secret@host/db", "mlflow ui --backend-store-uri 'postgresql://me:***@host/db' then open "
         "http://127.0.0.1:5000/#{run}"),
        ("databricks", "databricks"),
    ],
)  # fmt: skip
def test_way_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str | None, expected: str) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    directory = make_run(tmp_path, "run", *([f"tracking.uri={uri}"] if uri else []))
    assert "#/experiments" not in how_to_look(directory), "MLflow has no such run yet"
    Shipped(uri, run_id="abc", experiment_id="7").write(directory.mlflow_file)
    run = "/experiments/7/runs/abc?workflowType=machine_learning"
    assert " ".join(how_to_look(directory).split()) == expected.format(root=tmp_path, run=run)
    Shipped("http://elsewhere", run_id="abc", experiment_id="7").write(directory.mlflow_file)
    if uri:
        assert "#/experiments" not in how_to_look(directory), "that was another server's run"

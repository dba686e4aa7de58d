"""What MLflow shows is what metrics.jsonl, the pictures and status.json say: everything once, and the true state.

A real MLflow and real shipper processes; runs are shared by the tests that look at them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade import append, make_run
from harness import Job, call_train, metrics, start, status, wait_for_step
from mlflow_server import mlflow_server, shippers_of, wait_for_answer

from ddpm_dist.config import Config, load_config, to_flat, to_yaml
from ddpm_dist.errors import ExitCode
from ddpm_dist.parallel.local import free_port
from ddpm_dist.run import lease as leases
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.lease import claim
from ddpm_dist.tracking import delivery
from ddpm_dist.tracking.delivery import follow
from ddpm_dist.tracking.destination import prepare_client
from ddpm_dist.tracking.shipper import METRICS, RECORDS_PER_BATCH, NotDelivered, Shipper

pytestmark = pytest.mark.slow

RUN = ("tracking.enabled=true", "checkpoint.every=7")
LONG = (*RUN, "train.max_steps=60")


@pytest.fixture(scope="module", autouse=True)
def _quick_client() -> Iterator[None]:
    """The waiting times of the shipper itself also for what the tests ask MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "GIT_PYTHON_REFRESH"):
            patch.setenv(name, "")
            del os.environ[name]
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        prepare_client()
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.root of all runs that use the default database; an experiment each."""
    return tmp_path_factory.mktemp("runs")


def database(root: Path) -> str:
    return f"sqlite:///{root}/mlflow.db"


def runs_in(uri: str, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def the_run(uri: str, experiment: str) -> Any:
    """The only run of the experiment."""
    runs = runs_in(uri, experiment)
    assert len(runs) == 1
    return runs[0]


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def wait_for_shippers(run: Path) -> None:
    wait_until(lambda: not shippers_of(run), f"a shipper still at work; {log_of(run)}", 90)


def log_of(run: Path) -> str:
    path = run / "shipper.log"
    return path.read_text(errors="replace") if path.exists() else ""


def points(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value)]} as stored, in the order of the steps; a doubled step shows twice."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run_id, key)) for key in METRICS
    }


def first_lines(run: Path) -> list[dict[str, Any]]:
    """One record a step: of a step that was trained again the first, which may be with MLflow already."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in metrics(run):
        by_step.setdefault(record["step"], record)
    return [by_step[step] for step in sorted(by_step)]


def assert_delivered(uri: str, experiment: str, run: Path, state: str = "FINISHED") -> Any:
    """One run, in this state, with each step's metrics once and as they stand in metrics.jsonl."""
    found = the_run(uri, experiment)
    assert found.info.status == state, log_of(run)
    records = first_lines(run)
    assert records
    assert points(uri, found.info.run_id) == {
        key: [(record["step"], record[key]) for record in records] for key in METRICS
    }
    return found


# The default: a database in run.root


def train_and_name_imports(argv: Sequence[str]) -> int:
    """The real command, which then leaves a list of all that this process has imported."""
    code = call_train(argv)
    place = next(word for word in argv if word.startswith("run.root=")).removeprefix("run.root=")
    (Path(place) / "imported").write_text("\n".join(sorted(sys.modules)))
    return code


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """A run that trained to its end, with pictures; its trainer has waited for its shipper."""
    overrides = (*RUN, "tracking.experiment=finished", "train.max_steps=12", "optim.warmup_steps=20")
    pictures = ("preview.num_images=4", "preview.steps=2", "preview.every=6")
    with start(1, root, *overrides, *pictures, name="finished", function=train_and_name_imports) as job:
        assert job.wait() == [0], job.output()
    return root / "finished"


def test_finished_run_is_delivered_when_training_returns(root: Path, finished: Path) -> None:
    assert shippers_of(finished) == []
    found = assert_delivered(database(root), "finished", finished)
    assert found.info.run_name == "finished"
    assert found.info.end_time is not None


def test_params_are_all_keys_of_the_config(root: Path, finished: Path) -> None:
    flat = to_flat(load_config(finished / "config.yaml"))
    expected = {key: "null" if value is None else str(value) for key, value in flat.items()}
    assert the_run(database(root), "finished").data.params == expected


def test_artifacts_are_the_files_themselves(root: Path, finished: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(database(root))
    run_id = the_run(database(root), "finished").info.run_id
    names = ["config.yaml", "curves.png", "samples/step-00000006.png", "samples/step-00000012.png"]
    for name in names:
        downloaded = client.download_artifacts(run_id, name, str(tmp_path))
        assert Path(downloaded).read_bytes() == (finished / name).read_bytes()
    assert sorted(item.path for item in client.list_artifacts(run_id)) == ["config.yaml", "curves.png", "samples"]
    assert sorted(item.path for item in client.list_artifacts(run_id, "samples")) == names[2:]


def test_trainer_never_imports_mlflow(root: Path, finished: Path) -> None:
    imported = (root / "imported").read_text().split("\n")
    assert "ddpm_dist.tracking.process" in imported
    assert [name for name in imported if name.split(".")[0] in ("mlflow", "sqlalchemy")] == []


def test_finished_run_that_is_started_again_changes_nothing_in_mlflow(root: Path, finished: Path) -> None:
    before = the_run(database(root), "finished").info
    with start(1, root, *RUN, "tracking.experiment=finished", "train.max_steps=12", "optim.warmup_steps=20",
               name="finished") as job:  # fmt: skip
        assert job.wait() == [0], job.output()
    after = the_run(database(root), "finished").info
    assert (after.status, after.end_time) == (before.status, before.end_time)


# Stopped, killed, resumed


def resume(world_size: int, root: Path, name: str) -> None:
    with start(world_size, root, *LONG, f"tracking.experiment={name}", name=name) as job:
        assert job.wait() == [0] * world_size, job.output()
    assert status(root / name)["attempt"] == 2
    wait_for_shippers(root / name)


def test_run_stopped_by_a_signal_is_killed_in_mlflow_and_the_same_run_when_resumed(root: Path, finished: Path) -> None:
    run, uri = root / "stopped", database(root)
    with start(2, root, *LONG, "tracking.experiment=stopped", name="stopped") as job:
        wait_for_step(job, run, 10, 1)
        job.signal(1, signal.SIGTERM)
        assert job.wait(30) == [75, 75], job.output()
    assert status(run)["step"] < 60
    wait_for_shippers(run)
    first = assert_delivered(uri, "stopped", run, "KILLED")
    resume(2, root, "stopped")
    second = assert_delivered(uri, "stopped", run)
    assert second.info.run_id == first.info.run_id
    assert [step for step, _ in points(uri, first.info.run_id)["loss"]] == list(range(1, 61))


def test_run_whose_trainer_was_killed_is_failed_in_mlflow_and_no_step_doubled_when_resumed(
    root: Path, finished: Path
) -> None:
    run, uri = root / "killed", database(root)
    with start(1, root, *LONG, "tracking.experiment=killed", name="killed") as job:
        wait_for_step(job, run, 12, 1)
        job.kill()
    assert status(run)["state"] == "running", "the trainer has said how it ended"
    wait_for_shippers(run)
    first = assert_delivered(uri, "killed", run, "FAILED")
    resume(1, root, "killed")
    steps = [record["step"] for record in metrics(run)]
    assert len(steps) > len(set(steps)), "no step was trained again: the test shows nothing"
    second = assert_delivered(uri, "killed", run)
    assert second.info.run_id == first.info.run_id
    assert [step for step, _ in points(uri, first.info.run_id)["loss"]] == list(range(1, 61))


# A server


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def undelivered(root: Path, address: str) -> Path:
    """A run that was trained while its server was down, and whose shipper has been killed over its last tries."""
    run = root / "undelivered"
    overrides = (*RUN, "train.max_steps=30", "tracking.experiment=undelivered", f"tracking.uri={address}")
    with start(1, root, *overrides, name="undelivered") as job:
        assert job.wait() == [0], job.output()
    try:
        wait_until(lambda: "not delivered yet" in log_of(run), "the shipper never tried")
    finally:
        for pid in shippers_of(run):
            os.kill(pid, signal.SIGKILL)
    wait_for_shippers(run)
    assert "ddpm_dist.sync" in job.output(), "nobody is told how to deliver later"
    return run


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, root: Path, finished: Path, undelivered: Path, port: int, address: str
) -> Iterator[str]:
    """A real MLflow server, which comes up only after `undelivered` has been trained. Its address."""
    place = tmp_path_factory.mktemp("server")
    shutil.copy(root / "mlflow.db", place / "server.db")  # its many tables take seconds to make
    with mlflow_server(place, port) as process:
        wait_for_answer(process, place, port)
        yield address


def train_with(environment: dict[str, str], argv: Sequence[str]) -> int:
    os.environ.update(environment)
    return call_train(argv)


@pytest.mark.parametrize("how", ["tracking.uri", "MLFLOW_TRACKING_URI"])
def test_run_arrives_at_a_server(tmp_path: Path, server: str, how: str) -> None:
    overrides: tuple[str, ...] = (*RUN, "train.max_steps=8", f"tracking.experiment={how}")
    function: Callable[..., int] = call_train
    if how == "tracking.uri":
        overrides = (*overrides, f"tracking.uri={server}", "preview.num_images=1", "preview.steps=1")
    else:
        function = functools.partial(train_with, {how: server})
    with start(1, tmp_path, *overrides, function=function) as job:
        assert job.wait() == [0], job.output()
    wait_for_shippers(tmp_path / "run")
    found = assert_delivered(server, how, tmp_path / "run")
    link = f"{server}/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}?workflowType=machine_learning"
    assert link in job.output(), "nobody is told where to look"
    assert not (tmp_path / "mlflow.db").exists()
    if how == "tracking.uri":
        from mlflow import MlflowClient

        client = MlflowClient(server)
        for name in ("config.yaml", "curves.png", "samples/step-00000008.png"):
            downloaded = client.download_artifacts(found.info.run_id, name, str(tmp_path))
            assert Path(downloaded).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_training_is_finished_although_the_server_is_down(undelivered: Path) -> None:
    assert status(undelivered)["state"] == "finished"
    records = metrics(undelivered)
    assert [record["step"] for record in records] == list(range(1, 31))
    pauses = [after["time"] - before["time"] for before, after in itertools.pairwise(records)]
    assert max(pauses) < 4, "a try to reach the server takes up to 5 s: a step has waited for one"


def call_sync(*runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddpm_dist.sync", *map(str, runs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def test_sync_delivers_everything_and_the_true_state_once_the_server_is_up(undelivered: Path, server: str) -> None:
    assert runs_in(server, "undelivered") == []
    done = call_sync(undelivered)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "delivered, state finished" in done.stdout
    assert f"{server}/#/experiments/" in done.stdout, "nobody is told where to look"
    assert_delivered(server, "undelivered", undelivered)
    assert call_sync(undelivered).returncode == 0
    assert_delivered(server, "undelivered", undelivered)


# A run directory made by hand, shipped from this process


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` catches it, and nothing is written after it."""


@pytest.mark.parametrize("died", ["run", "params", "metrics", "artifact"])
def test_shipper_killed_between_an_acknowledgement_and_its_note_ships_nothing_twice(
    root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, died: str
) -> None:
    directory = make_run(root, f"died-after-{died}")
    (directory.samples / "step-00000020.png").write_bytes(b"a picture")
    note = Shipper._note

    def die(self: Shipper) -> None:
        shipped = self._shipped
        acknowledged = {
            "run": shipped.run_id,
            "params": shipped.params,
            "metrics": shipped.offset,
            "artifact": shipped.artifacts,
        }
        if acknowledged[died]:
            raise Killed
        note(self)

    with monkeypatch.context() as patch:
        patch.setattr(Shipper, "_note", die)
        with pytest.raises(Killed):
            Shipper(directory).ship("running")
    assert runs_in(database(root), f"died-after-{died}"), "MLflow had acknowledged nothing: the test shows nothing"
    append(directory, range(15, 23), attempt=2)  # the trainer died too, and has trained steps again
    Shipper(directory).ship("finished")
    found = assert_delivered(database(root), f"died-after-{died}", directory.path)
    assert len(found.data.params) == len(to_flat(Config()))


def test_killed_before_its_note_of_the_params_a_changed_config_can_still_be_shipped(
    root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow lets no parameter change, and the note of what it has got is lost."""
    directory = make_run(root, "changed-params")
    note = Shipper._note

    def die(self: Shipper) -> None:
        if self._shipped.params:
            raise Killed
        note(self)

    with monkeypatch.context() as patch:
        patch.setattr(Shipper, "_note", die)
        with pytest.raises(Killed):
            Shipper(directory).ship("running")
    config = directory.read_config()
    directory.config_file.write_text(to_yaml(replace(config, train=replace(config.train, max_steps=77))))
    Shipper(directory).ship("finished")
    assert_delivered(database(root), "changed-params", directory.path)


def ship_and_die(directory: Path) -> int:
    """A shipper that is killed by SIGKILL after MLflow has acknowledged the first metrics."""
    note = Shipper._note

    def die(self: Shipper) -> None:
        if self._shipped.offset:
            os.kill(os.getpid(), signal.SIGKILL)
        note(self)

    Shipper._note = die  # type: ignore[method-assign]
    prepare_client()
    Shipper(RunDirectory(directory)).ship("running")
    return 0


def test_shipper_that_got_a_real_sigkill_leaves_no_lock_and_ships_nothing_twice(root: Path, finished: Path) -> None:
    directory = make_run(root, "sigkill")
    with Job(1, root / "sigkill.log", ship_and_die, (directory.path,)) as job:
        assert job.wait(60) == [-signal.SIGKILL], job.output()
    noted = json.loads(directory.mlflow_file.read_text())
    assert noted["offset"] == 0
    assert len(points(database(root), noted["run_id"])["loss"]) == 20, "nothing was acknowledged"
    done = call_sync(directory.path)
    assert done.returncode == 0, done
    assert_delivered(database(root), "sigkill", directory.path)


def test_a_kill_while_the_database_is_made_leaves_nothing_half_made(root: Path, finished: Path, tmp_path: Path) -> None:
    """MLflow makes its tables in dozens of steps, and fails for ever after a kill between two of them."""
    directory = tmp_path / "killed"
    shutil.copytree(finished, directory)
    (directory / "mlflow.json").unlink()
    command = (sys.executable, "-m", "ddpm_dist.tracking.delivery", str(directory), "--follow", str(os.getpid()))
    made, whole = tmp_path / ".mlflow.db.tmp", tmp_path / "mlflow.db"

    def has_grown(size: int) -> bool:
        return whole.exists() or (made.exists() and made.stat().st_size >= size)

    for size in (1, 100_000, 200_000):
        with open(tmp_path / "log", "ab") as log:
            shipper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(functools.partial(has_grown, size), "the making of the database")
        finally:
            shipper.kill()
            shipper.wait()
        if size == 1:
            assert not whole.exists(), "it was too late: nothing is shown"
    done = call_sync(directory)
    assert done.returncode == 0, done
    assert len(runs_in(database(tmp_path), load_config(directory / "config.yaml", []).tracking.experiment)) == 1


def test_more_lines_than_fit_into_one_batch_arrive_in_order(root: Path, finished: Path) -> None:
    directory = make_run(root, "many", steps=RECORDS_PER_BATCH * 2 + 1)
    Shipper(directory).ship("finished")
    assert_delivered(database(root), "many", directory.path)


def test_points_have_the_time_at_which_they_were_logged(root: Path, finished: Path) -> None:
    from mlflow import MlflowClient

    directory = make_run(root, "timed", steps=5)
    Shipper(directory).ship("finished")
    history = MlflowClient(database(root)).get_metric_history(the_run(database(root), "timed").info.run_id, "loss")
    expected = [(record["step"], int(record["time"] * 1000)) for record in metrics(directory.path)]
    assert sorted((point.step, point.timestamp) for point in history) == expected, "MLflow counts milliseconds"


def test_picture_that_was_drawn_anew_is_sent_again(root: Path, finished: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    directory = make_run(root, "redrawn", steps=5)
    picture = directory.samples / "step-00000005.png"
    shipper = Shipper(directory)
    for content in (b"first", b"and another"):
        picture.write_bytes(content)
        shipper.ship("running")
    run_id = the_run(database(root), "redrawn").info.run_id
    downloaded = MlflowClient(database(root)).download_artifacts(run_id, "samples/step-00000005.png", str(tmp_path))
    assert Path(downloaded).read_bytes() == b"and another"


def test_torn_line_is_shipped_once_it_is_whole(root: Path, finished: Path) -> None:
    directory = make_run(root, "torn", steps=5)
    whole = directory.metrics_file.read_bytes()
    directory.metrics_file.write_bytes(whole[:-10])
    shipper = Shipper(directory)
    shipper.ship("running")
    assert len(points(database(root), the_run(database(root), "torn").info.run_id)["loss"]) == 4
    directory.metrics_file.write_bytes(whole)
    shipper.ship("finished")
    assert_delivered(database(root), "torn", directory.path)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_no_number_does_not_stop_what_follows(root: Path, finished: Path, loss: float) -> None:
    directory = make_run(root, f"loss-{loss}", steps=3)
    append(directory, range(4, 6), 1, loss=loss)
    append(directory, range(6, 9), 1)
    Shipper(directory).ship("finished")
    found = the_run(database(root), f"loss-{loss}")
    stored = points(database(root), found.info.run_id)
    assert [step for step, _ in stored["lr"]] == list(range(1, 9))
    assert [step for step, _ in stored["loss"]] == [1, 2, 3, 6, 7, 8]


def test_key_that_later_attempts_changed_becomes_a_tag(root: Path, finished: Path) -> None:
    directory = make_run(root, "retuned")
    Shipper(directory).ship("running")
    config = directory.read_config()
    directory.config_file.write_text(to_yaml(replace(config, train=replace(config.train, max_steps=77))))
    Shipper(directory).ship("finished")
    found = assert_delivered(database(root), "retuned", directory.path)
    assert found.data.tags["changed.train.max_steps"] == "77"
    assert found.data.params["train.max_steps"] == "null"


def test_two_runs_of_one_name_in_different_roots_are_two_runs(root: Path, finished: Path, tmp_path: Path) -> None:
    uri = f"tracking.uri={database(root)}"
    for place in (tmp_path / "one", tmp_path / "other"):
        place.mkdir()
        Shipper(make_run(place, "twins", uri)).ship("finished")
    assert len(runs_in(database(root), "twins")) == 2


def test_another_environment_or_working_directory_does_not_split_a_run(
    root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As by `ddpm_dist.sync` from another shell; run.root is often relative."""
    monkeypatch.chdir(root)
    directory = make_run(Path("."), "elsewhere")
    Shipper(directory).ship("running")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(root / "elsewhere")
    Shipper(directory).ship("running")
    append(directory, range(21, 25), attempt=2)
    Shipper(directory).ship("finished")
    assert_delivered(database(root), "elsewhere", directory.path)


def test_coming_back_to_a_server_goes_on_with_the_run_that_is_there(root: Path, finished: Path) -> None:
    """tracking.uri may change, and change back."""
    directory = make_run(root, "back")
    Shipper(directory).ship("running")
    make_run(root, "back", f"tracking.uri=http://127.0.0.1:{free_port()}", steps=0)
    with pytest.raises(NotDelivered):
        Shipper(directory).ship("running")
    make_run(root, "back", f"tracking.uri={database(root)}", steps=0)
    append(directory, range(21, 25), attempt=2)
    Shipper(directory).ship("finished")
    assert_delivered(database(root), "back", directory.path)


def test_a_folder_as_tracking_uri_is_refused_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow would refuse it later, in a process that nobody looks at."""
    with start(1, root, *RUN, "tracking.uri=./mlruns", name="folder") as job:
        assert job.wait(60) == [ExitCode.CONFIG], job.output()
        assert "MLFLOW_TRACKING_URI" in job.output()
    assert not (root / "folder").exists()


def test_a_line_without_its_time_is_passed_over(root: Path, finished: Path) -> None:
    directory = make_run(root, "odd")
    with directory.metrics_file.open("a") as file:
        file.write('{"step": 21, "loss": 1.0}\n')
    Shipper(directory).ship("finished")
    assert [step for step, _ in points(database(root), the_run(database(root), "odd").info.run_id)["loss"]] == [
        *range(1, 21)
    ]


ANSWERS = {
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    "429": b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 900\r\nContent-Length: 0\r\n\r\n",
    "garbage": b"\x00\xff\x00 neither HTTP nor anything",
    "wrong": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html>a proxy",
    "reset": b"",
}


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that says the same to everybody and hangs up. Its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_server_that_answers_nonsense_costs_seconds_and_no_point(
    root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    prepare_client()
    with answering(ANSWERS[kind]) as port:
        directory = make_run(root, f"nonsense-{kind}", f"tracking.uri=http://127.0.0.1:{port}")
        begun = time.monotonic()
        with pytest.raises(NotDelivered):
            Shipper(directory).ship("running")
        assert time.monotonic() - begun < 20
    make_run(root, f"nonsense-{kind}", f"tracking.uri={database(root)}", steps=0)
    Shipper(directory).ship("finished")
    assert_delivered(database(root), f"nonsense-{kind}", directory.path)


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_last_tries_are_bounded_and_nothing_is_lost(
    root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setattr(delivery, "LAST_TRIES_SECONDS", 0.5)
    monkeypatch.setattr(delivery, "POLL_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and never says a word
        number = listener.getsockname()[1] if kind == "silent" else free_port()
        directory = make_run(root, f"bounded-{kind}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{number}")
        begun = time.monotonic()
        assert follow(directory, trainer_pid=0) == 1
        assert time.monotonic() - begun < 10
    said = capsys.readouterr().out
    assert "gave up" in said
    assert f"ddpm_dist.sync {directory.path}" in said
    make_run(root, f"bounded-{kind}", f"tracking.uri={database(root)}", steps=0)
    Shipper(directory).ship("finished")
    assert_delivered(database(root), f"bounded-{kind}", directory.path)


def test_sync_of_a_run_whose_trainer_was_killed_says_failed(
    root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat tells, on this machine or on another; while there is one, the run is running."""
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "STALE_SECONDS", 2.0)
    directory = make_run(root, "wordless", state="running")
    lease = claim(directory.attempts, {}, 1)
    try:
        assert delivery.sync(directory) == "running"
    finally:
        lease.release()
    path = directory.attempts / "00001.json"
    facts = json.loads(path.read_text()) | {"ended": None}
    for changed in ({"pid": 2**22 + 1}, {"host": "node17"}):
        path.write_text(json.dumps(facts | changed))
        assert delivery.sync(directory) == "failed"
    assert_delivered(database(root), "wordless", directory.path, "FAILED")


def test_sync_of_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    done = call_sync(tmp_path)
    assert done.returncode == ExitCode.DATA
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1

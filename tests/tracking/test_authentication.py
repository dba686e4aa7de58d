"""A real MLflow server that asks for a user name and a password: who may write arrives, who may not is told why.

The server is the one of docs/mlflow.md, on loopback and on a port of its own. The passwords are no secrets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from documents import commands_in
from handmade import make_run, set_state
from harness import Job, wait_until
from mlflow_server import server_process, shippers_of, wait_for_answer

from ddpm_dist import sync
from ddpm_dist.errors import ExitCode
from ddpm_dist.parallel.local import free_port
from ddpm_dist.tracking.destination import prepare_client
from ddpm_dist.tracking.process import ShipperProcess

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
REFUSED = r"does not accept .* \(401\); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
ADMIN, READER = ("admin", "choose-a-long-one"), ("reader", "another-password-2")


@dataclass(frozen=True)
class Server:
    """An MLflow server with users."""

    uri: str

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        """What the server answers to the administrator."""
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
        passwords.add_password(None, self.uri, *ADMIN, is_authenticated=True)
        opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)

    def runs(self, experiment: str) -> list[Any]:
        found = self.post("experiments/search", {"max_results": 100, "filter": f"name = '{experiment}'"})
        ids = [each["experiment_id"] for each in found.get("experiments", [])]
        return list(self.post("runs/search", {"experiment_ids": ids}).get("runs", [])) if ids else []


def typed(with_words: str, port: int) -> list[str]:
    """The lines of the block of docs/mlflow.md that has these words, for a server on another port."""
    commands = commands_in((ROOT / "docs" / "mlflow.md").read_text(encoding="utf-8"))
    (block,) = {command.block for command in commands if with_words in command.text}
    return [command.text.replace("5000", str(port)) for command in commands if command.block == block]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with passwords that docs/mlflow.md starts, typed as printed there."""
    pytest.importorskip("flask_wtf", reason="the server wants it: pip install 'mlflow[auth]'")
    place, port = tmp_path_factory.mktemp("server"), free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", "\n".join(["set -e", *typed("--app-name basic-auth", port)])]
    with server_process(command, place, {"HOME": str(place), "PATH": path}) as process:
        wait_for_answer(process, place, port, timeout=300)
        found = Server(f"http://127.0.0.1:{port}")
        found.post("users/create", {"username": READER[0], "password": READER[1]})
        yield found


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `prepare_client` and a user set, for this process and the ones that it starts; gone afterwards."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "GIT_PYTHON_REFRESH", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        monkeypatch.setenv(name, "")
        del os.environ[name]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # other tests may keep this machine busy
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    prepare_client()


def log_in(monkeypatch: pytest.MonkeyPatch, user: tuple[str, str] | None) -> None:
    for name, value in zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), user or ("", ""), strict=True):
        monkeypatch.setenv(name, value)


def end_shippers(run: Path) -> None:
    """They go on trying for a minute after their trainer, and `sync` would wait for them."""
    for pid in shippers_of(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not shippers_of(run), lambda: "a shipper is still alive")


def test_a_run_arrives_at_a_server_that_knows_its_user(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *exports, last = typed("MLFLOW_TRACKING_USERNAME", int(server.uri.rpartition(":")[2]))
    assert last.startswith("make train"), "which would take minutes"
    options = ("tracking.enabled=true", "tracking.experiment=known", "train.max_steps=12")
    argv = [sys.executable, "-m", "ddpm_dist.train", *Job.argv(tmp_path, *options, name="known")]
    shell = ["bash", "-c", "\n".join([*exports, shlex.join(argv)])]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    end_shippers(tmp_path / "known")
    assert (tmp_path / "known" / "shipper.log").read_text() == "", "the page says how one sees that it works"
    log_in(monkeypatch, ADMIN)
    assert sync.main([str(tmp_path / "known")]) == 0
    (run,) = server.runs("known")
    assert run["info"]["status"] == "FINISHED"
    assert {"loss", "lr", "grad_norm"} <= {metric["key"] for metric in run["data"]["metrics"]}
    texts = [path.read_text() for path in (tmp_path / "known").glob("*.*") if path.suffix in (".json", ".yaml", ".log")]
    said = capsys.readouterr()
    assert ADMIN[1] not in "".join([done.stdout, said.out, *texts]), "a file of the run, or what was printed, has it"
    links = re.findall(r"http://\S+", said.out + said.err)
    assert [link.partition("?")[2] for link in links] == ["workflowType=machine_learning"], "one link, that of the run"


def test_a_user_whom_the_page_makes_may_write(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.post("experiments/create", {"name": "mnist"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    log_in(monkeypatch, ADMIN)
    command = "\n".join(typed("grant_user_permission", 5000)).replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    options = (f"tracking.uri={server.uri}", "tracking.experiment=mnist")
    directory = make_run(tmp_path, "of-mary", *options, state="finished")
    log_in(monkeypatch, ("mary", "another-long-one"))
    assert sync.main([str(directory.path)]) == 0
    assert len(server.runs("mnist")) == 1


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, REFUSED),
        ((ADMIN[0], "wrong-password-3"), REFUSED),
        (READER, r"does not permit this user to write into tracking\.experiment=private \(403\)"),
    ],
    ids=["nobody", "wrong password", "may only read"],
)
def test_who_may_not_write_is_told_so_in_one_line_and_delivers_later(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    user: tuple[str, str] | None,
    expected: str,
) -> None:
    """This process is the trainer of a run that ends."""
    with contextlib.suppress(urllib.request.HTTPError):  # it is there already
        server.post("experiments/create", {"name": "private"})
    before, log = len(server.runs("private")), tmp_path / "refused" / "shipper.log"
    options = (f"tracking.uri={server.uri}", "tracking.experiment=private")
    directory = make_run(tmp_path, "refused", *options, state="running")
    log_in(monkeypatch, user)
    shipper = ShipperProcess.start(directory.path)
    try:
        wait_until(lambda: "not delivered yet" in log.read_text(), log.read_text, timeout=300)
        set_state(directory, "finished", 20)
        begun = time.monotonic()
        shipper.wait(60)
        assert time.monotonic() - begun < 6.5
    finally:
        end_shippers(directory.path)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(expected, line), line
    assert line.endswith(f"python -m ddpm_dist.sync {directory.path}")
    assert len(log.read_text().splitlines()) == 1, "the same trouble is written down once, and without a traceback"

    assert sync.main([str(directory.path)]) == ExitCode.SOFTWARE
    refused = capsys.readouterr().err
    assert re.search(expected, refused), refused
    assert refused.count("\n") == 1
    assert len(server.runs("private")) == before

    log_in(monkeypatch, ADMIN)
    assert sync.main([str(directory.path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{directory.path}: delivered, state finished"
    assert len(server.runs("private")) == before + 1

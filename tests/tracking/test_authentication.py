"""A real MLflow server that asks for a user name and a password: who may write arrives, who may not is told why.

The passwords are made up for this test, and the server listens on loopback only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from harness import Job, status, wait_until
from mlflow_server import mlflow_server, shippers_of, wait_for_answer

from ddpm_dist.errors import ExitCode
from ddpm_dist.parallel.local import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ADMIN, READER = ("admin", "a-long-password-1"), ("reader", "another-password-2")
CONFIGURATION = """[mlflow]
default_permission = READ
database_uri = sqlite:///{place}/users.db
admin_username = {admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 600
"""


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("flask_wtf", reason="the server wants it: pip install 'mlflow[auth]'")
    place, port = tmp_path_factory.mktemp("server"), free_port()
    (place / "auth.ini").write_text(CONFIGURATION.format(place=place, admin=ADMIN[0]))
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(place / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "made up for this test",
    }
    with mlflow_server(place, port, "--app-name", "basic-auth", environment=environment) as process:
        wait_for_answer(process, place, port)
        found = Server(f"http://127.0.0.1:{port}")
        found.post("users/create", {"username": READER[0], "password": READER[1]})
        yield found


def environment_of(user: tuple[str, str] | None) -> dict[str, str]:
    names = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
    clean = {name: value for name, value in os.environ.items() if name not in names}
    # The server does little but hash passwords, and other tests may keep this machine busy.
    return clean | dict(zip(names, user or (), strict=False)) | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def call(user: tuple[str, str] | None, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of our commands, as this user of MLflow."""
    argv = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment_of(user), check=False
    )


def end_shippers(run: Path) -> None:
    """They go on trying for a minute after their trainer, and `sync` would wait for them."""
    for pid in shippers_of(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not shippers_of(run), lambda: "a shipper is still alive")


def train(server: Server, root: Path, user: tuple[str, str] | None, name: str, *overrides: str) -> str:
    """Train to the end; returns what the command printed. The run has the name of its experiment."""
    options = ("tracking.enabled=true", f"tracking.uri={server.uri}", f"tracking.experiment={name}", *overrides)
    done = call(user, "ddpm_dist.train", *Job.argv(root, *options, "train.max_steps=12", name=name))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_arrives_at_a_server_that_knows_its_user(server: Server, tmp_path: Path) -> None:
    said = train(server, tmp_path, ADMIN, "known")
    (run,) = server.runs("known")
    assert run["info"]["status"] == "FINISHED"
    assert {"loss", "lr", "grad_norm"} <= {metric["key"] for metric in run["data"]["metrics"]}
    assert f"{server.uri}/#/experiments/" in said
    everything = said + "".join(path.read_text() for path in (tmp_path / "known").glob("*.*") if path.suffix != ".png")
    assert ADMIN[1] not in everything, "the password is in a file of the run, or was printed"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, r"does not accept .*\(401\).* MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ((ADMIN[0], "wrong-password-3"), r"does not accept .*\(401\).* MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_P"),
        (READER, r"does not permit .*\(403\).*tracking\.experiment=private"),
    ],
    ids=["nobody", "wrong password", "may only read"],
)
@pytest.mark.xfail(strict=True, reason="the line quotes MLflow's client, and does not say what the reader can do")
def test_who_may_not_write_is_told_so_and_delivers_later(
    server: Server, tmp_path: Path, user: tuple[str, str] | None, expected: str
) -> None:
    with contextlib.suppress(urllib.request.HTTPError):  # it is there already
        server.post("experiments/create", {"name": "private"})
    before, name = len(server.runs("private")), "refused"
    try:
        said = train(server, tmp_path, user, name, "tracking.experiment=private")
        waited = time.time() - status(tmp_path / name)["time"]
    finally:
        end_shippers(tmp_path / name)
    assert waited < 15, "a finished run waits 5 s for MLflow, and then a second or two for Python to end"
    run = str(tmp_path / name)
    (line,) = [each for each in said.splitlines() if "MLflow has not got everything" in each]
    assert re.search(expected, line), line
    assert f"python -m ddpm_dist.sync {run}" in line
    log = (tmp_path / name / "shipper.log").read_text()
    assert "Traceback" not in log
    assert len(log.splitlines()) == 1, "the same trouble is written down once"

    refused = call(user, "ddpm_dist.sync", run)
    assert refused.returncode == ExitCode.SOFTWARE
    assert re.search(expected, refused.stderr), refused.stderr
    assert refused.stderr.count("\n") == 1
    assert len(server.runs("private")) == before

    delivered = call(ADMIN, "ddpm_dist.sync", run)
    assert (delivered.returncode, delivered.stderr) == (0, ""), delivered
    assert delivered.stdout.splitlines()[0] == f"{run}: delivered, state finished"
    assert len(server.runs("private")) == before + 1


@pytest.mark.xfail(strict=True, reason="MLflow's client prints a link that opens the wrong workspace, above ours")
def test_sync_prints_one_link_to_the_run(server: Server, tmp_path: Path) -> None:
    train(server, tmp_path, ADMIN, "one-link")
    done = call(ADMIN, "ddpm_dist.sync", str(tmp_path / "one-link"))
    links = re.findall(r"http://\S+", done.stdout + done.stderr)
    assert [link.partition("?")[2] for link in links] == ["workflowType=machine_learning"], done

"""100,000 points into MLflow while the shipper, the server and the trainer are killed: part of `make torture`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness import TINY, write_status
from mlflow_server import answers, mlflow_server, shippers_of

from ddpm_dist.config import load_config, to_yaml
from ddpm_dist.errors import ExitCode
from ddpm_dist.parallel.local import free_port
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.journal import Journal
from ddpm_dist.tracking.process import ShipperProcess
from ddpm_dist.tracking.shipper import METRICS

LINES, ATTEMPTS = 17_000, 4  # six metrics a line


def train(directory: RunDirectory, attempt: int) -> None:
    """Write a quarter of the lines, as a trainer does.

    It begins with the last hundred lines of the attempt before, as after a kill.
    """
    write_status(directory.path, "running", 0, attempt)
    journal, shipper = Journal(directory.metrics_file), ShipperProcess.start(directory.path)
    first = max(1, (attempt - 1) * LINES // ATTEMPTS - 100)
    for step in range(first, attempt * LINES // ATTEMPTS + 1):
        figures = dict.fromkeys(METRICS, step + attempt / 8)
        journal.append({"step": step, "attempt": attempt, "time": 1.7e9 + attempt * 1e6 + step, **figures})
        if step % 20 == 0:
            shipper.revive()
            time.sleep(0.1)
    if attempt == ATTEMPTS:
        write_status(directory.path, "finished", LINES, attempt, ExitCode.FINISHED)
        shipper.wait(60)
    else:
        time.sleep(600)  # until it is killed


def campaign(root: Path, seed: int, http_server: bool) -> str:
    """Kill 10 shippers, 3 trainers and, if there is a server, that 3 times. Then compare what MLflow has."""
    draw, port, killed = random.Random(seed), free_port(), {"shipper": 0, "server": 0, "trainer": 0}
    uri = f"http://127.0.0.1:{port}" if http_server else f"sqlite:///{root}/mlflow.db"
    config = load_config(
        None, [*TINY, "tracking.enabled=yes", f"run.root={root}", "run.name=run", f"tracking.uri={uri}"]
    )
    directory = RunDirectory(config.directory)
    directory.create()
    directory.config_file.write_text(to_yaml(config))
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(mlflow_server(root, port))] if http_server else []
        for attempt in range(1, ATTEMPTS + 1):
            argv = [sys.executable, __file__, str(directory.path), str(attempt)]
            trainer = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
            stack.callback(trainer.kill)
            end = time.monotonic() + 26  # it writes for some 22 s
            while time.monotonic() < end and trainer.poll() is None:
                time.sleep(draw.uniform(3, 9))
                if killed["shipper"] < 10 and (pids := shippers_of(directory.path)):
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    killed["shipper"] += 1
                if http_server and killed["server"] < min(3, attempt):
                    os.killpg(servers[-1].pid, signal.SIGKILL)
                    time.sleep(3)
                    servers.append(stack.enter_context(mlflow_server(root, port)))
                    killed["server"] += 1
            if attempt < ATTEMPTS:
                trainer.kill()
                killed["trainer"] += 1
            trainer.wait(200)
        deliver(directory, port if http_server else None)
        return f"{compare(directory, uri)}; killed: {killed}"


def deliver(directory: RunDirectory, port: int | None) -> None:
    """Call `ddpm_dist.sync` until it succeeds, as a user would."""
    deadline = time.monotonic() + 300
    while True:
        if port is None or answers(port):
            argv = [sys.executable, "-m", "ddpm_dist.sync", str(directory.path)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, done.stderr
        time.sleep(1)


def compare(directory: RunDirectory, uri: str) -> str:
    """Assert that MLflow has each point exactly once, with its value. Returns the figures."""
    from mlflow import MlflowClient

    written: dict[int, dict[str, float]] = {}
    for line in directory.metrics_file.read_text().splitlines():
        with contextlib.suppress(ValueError):  # torn by a kill
            record = json.loads(line)
            written.setdefault(record["step"], record)
    client, run_id = MlflowClient(uri), json.loads(directory.mlflow_file.read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    total = lost = doubled = other = 0
    for name in METRICS:
        stored = [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        steps = {step for step, _ in stored}
        lost += len(written.keys() - steps)
        doubled += len(stored) - len(steps)
        # If a step was trained twice, MLflow has the line that was written first.
        other += sum(written[step][name] != value for step, value in stored if step in written)
        total += len(stored)
    assert (lost, doubled, other) == (0, 0, 0), f"{lost} lost, {doubled} doubled, {other} with another value"
    assert len(written) == LINES
    return f"{total} points: 0 lost, 0 doubled"


if __name__ == "__main__":
    train(RunDirectory(Path(sys.argv[1])), int(sys.argv[2]))

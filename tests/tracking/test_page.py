"""What a newcomer sees: the command and the link that the trainer prints, opened in a fresh browser."""

from __future__ import annotations

import contextlib
import getpass
import html
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Job, metrics
from mlflow_server import answers

from ddpm_dist.parallel.local import free_port

ROOT = Path(__file__).parents[2]
GENAI = "Observability"  # a heading of the workspace for language models, which knows no runs


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        words = "no Chromium here; Debian: apt-get install chromium"
        if os.environ.get("DDPM_REQUIRE_CHROMIUM"):
            pytest.fail(f"{words} (DDPM_REQUIRE_CHROMIUM is set)")
        pytest.skip(words)
    return found


def page_text(chromium: str, link: str, expected: str, profile: Path, timeout: float = 150) -> str:
    """The words of a page in a browser that was never used, once it shows the expected ones. `|` is between elements.

    The browser finds no other host than this one.
    """
    deadline, text = time.monotonic() + timeout, ""
    while expected not in text:
        assert time.monotonic() < deadline, f"no {expected!r} on the page, which says: {text}"
        shutil.rmtree(profile, ignore_errors=True)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        options += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--window-size=1400,1200"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [chromium, *options, "--dump-dom", link], capture_output=True, text=True, timeout=60, check=True
            )
            shown = re.sub(r"<(script|style|noscript).*?</\1>", "", done.stdout, flags=re.DOTALL)
            text = re.sub(r"(\s*\|\s*)+", " | ", html.unescape(re.sub(r"<[^>]*>", " | ", shown)))
    return text


@contextlib.contextmanager
def started(command: str, port: int, place: Path) -> Iterator[None]:
    """The command that was printed in the project's folder, on a port of its own."""
    program, *rest = shlex.split(command)
    mlflow = [str(ROOT / program)] if "/" in program else [sys.executable, "-m", program]
    argv = [*mlflow, *rest, "--port", str(port), "--workers", "1"]
    with open(place / "page.log", "wb") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=place, start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None, (place / "page.log").read_text()
            assert time.monotonic() < deadline, "MLflow's page does not come up"
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def checked_out_commit() -> str:
    """ "" where this is no git checkout."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "HEAD"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_a_newcomer_finds_the_run_by_the_printed_command_and_link(chromium: str, tmp_path: Path) -> None:
    options = ("tracking.enabled=true", "train.max_steps=12", "checkpoint.every=6", "tracking.experiment=first-steps")
    argv = [sys.executable, "-m", "ddpm_dist.train", *Job.argv(tmp_path, *options, name="newcomer")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    printed = re.search(r"MLflow +(?P<command>\S*mlflow ui .*?)\s+then open\s+(?P<link>http://\S+)", done.stdout)
    assert printed, done.stdout
    port = free_port()
    link = printed["link"].replace("127.0.0.1:5000", f"127.0.0.1:{port}")
    with started(printed["command"], port, tmp_path):
        text = page_text(chromium, link, "| images_per_second |", tmp_path / "profile")
        plain = page_text(chromium, link.partition("?")[0], "About this run", tmp_path / "profile")
    assert GENAI not in text, "the wrong workspace"
    assert GENAI in plain, "the workspace is recognised by a word that MLflow does not use any more"
    assert "newcomer" in text
    assert "first-steps" in text
    last = metrics(tmp_path / "newcomer")[-1]
    for name in ("loss", "grad_norm", "images_per_second"):
        assert re.search(rf"\| {name} \| {re.escape(str(last[name])[:6])}", text), name
    assert f"| Created by | {getpass.getuser()} |" in text
    assert re.search(r"\| Source \| ddpm_dist\.train \|", text)
    assert checked_out_commit()[:7] in text.partition("| Source |")[2].partition("| Logged models |")[0]
    assert f"python -m ddpm_dist.sample {tmp_path}/newcomer" in text
    assert "python -m ddpm_dist.train --config" in text
    assert re.search(r"\| Datasets \|[ |]*mnist5k", text)

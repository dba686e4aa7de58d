"""The doctor: each misconfiguration is named, by level and subject, and nothing else is an error.

The cluster is recorded: what scontrol said on slurm/local-cluster (3 nodes of 4 CPUs, 16 GB, 2 GPUs).
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm_dist.config import load_config
from launch.checks import Finding, examine
from launch.cluster import Cluster, gpus_of, parse_config, parse_lines, seconds_in
from launch.doctor import main
from launch.request import Request, from_arguments
from launch.site import Site, checkpoint_bytes, file_system_of, look, measure
from launch.submit import parse

RECORDED = Path(__file__).parent / "recorded"
SITE = Site(
    trouble="",
    file_system="nfs4",
    links_are_exclusive=True,
    checkpoint_bytes=100_000_000,
    save_seconds=2.0,
    free_bytes=10**12,
    python_file_system="nfs4",
    tracking_uri="http://mlflow.example:5000",
    tracking_trouble="",
    missing_images="",
    interfaces=("lo", "eth0"),
    environment={},
)


def recorded() -> Cluster:
    partitions = parse_lines((RECORDED / "partition.txt").read_text())
    nodes = parse_lines((RECORDED / "node.txt").read_text())
    return Cluster(
        parse_config((RECORDED / "config.txt").read_text()),
        {fields["PartitionName"]: fields for fields in partitions},
        {fields["NodeName"]: fields for fields in nodes},
        sacct=True,
    )


def request(*argv: str) -> Request:
    return from_arguments(parse(["--nodes=2", "--gpus-per-node=2", "--time=1:00:00", *argv]))


def with_config(**fields: str) -> Cluster:
    cluster = recorded()
    return dataclasses.replace(cluster, config=cluster.config | fields)


def with_partition(**fields: str) -> Cluster:
    cluster = recorded()
    return dataclasses.replace(cluster, partitions={"low": cluster.partitions["low"] | fields})


def with_nodes(**fields: str) -> Cluster:
    cluster = recorded()
    return dataclasses.replace(cluster, nodes={name: node | fields for name, node in cluster.nodes.items()})


def site(**facts: Any) -> Site:
    return dataclasses.replace(SITE, **facts)


def test_nothing_is_wrong_with_a_healthy_request() -> None:
    findings = examine(request(), recorded(), SITE)
    assert {finding.level for finding in findings} == {"ok"}, [str(finding) for finding in findings]
    assert len({finding.subject for finding in findings}) == 15


@pytest.mark.parametrize(
    ("argv", "cluster", "seen", "level", "subject", "words"),
    [
        (["--partition=gpu"], recorded, SITE, "error", "partition", ["gpu", "high, low"]),
        ([], lambda: with_partition(State="DOWN"), SITE, "error", "partition", ["low is DOWN"]),
        (["--account=me"], lambda: with_partition(AllowAccounts="a,b"), SITE, "error", "partition", ["me", "a,b"]),
        (["--qos=fast"], lambda: with_partition(AllowQos="slow"), SITE, "error", "partition", ["fast", "slow"]),
        ([], lambda: with_partition(MaxNodes="1"), SITE, "error", "partition", ["--nodes 2", "allows a job 1"]),
        (["--nodes=4"], recorded, SITE, "error", "nodes", ["3 node(s)"]),
        (["--cpus-per-task=3"], recorded, SITE, "error", "nodes", ["6 CPUs", "at most 4"]),
        (["--gpus-per-node=4"], recorded, SITE, "error", "nodes", ["4 GPUs", "at most 2"]),
        (["--mem=64G"], recorded, SITE, "error", "nodes", ["65536 MB", "at most 16000"]),
        (["--constraint=a100"], recorded, SITE, "error", "nodes", ["a100", "0 node(s)"]),
        ([], lambda: with_nodes(State="IDLE+DRAIN"), SITE, "warning", "nodes", ["0 can be used", "node1 IDLE+DRAIN"]),
        (["--tasks-per-node=1"], recorded, SITE, "warning", "GPUs", ["1 of 2", "idle"]),
        (["--gpus-per-node=0"], recorded, SITE, "warning", "GPUs", ["up to 2", "--gpus-per-node"]),
        (["train.device=cpu"], recorded, SITE, "warning", "GPUs", ["train.device=cpu"]),
        (["data.num_workers=4"], recorded, SITE, "warning", "CPUs", ["wants 5"]),
        (["data.name=folder", "data.image_size=28"], recorded, SITE, "warning", "CPUs", ["wants 3", "2 loader"]),
        (["--cpus-per-task=1"], recorded, SITE, "warning", "CPUs", ["--cpus-per-task 1", "--cpus-per-task=2"]),
        (
            *([], lambda: with_nodes(Gres="gpu:6", CPUTot="48", CPUEfctv="48"), SITE),
            *("warning", "GPUs", ["6 GPUs", "elastic.shards=8", "--gpus-per-node=4"]),
        ),
        (
            *(["--gpus-per-node=a100:2"], lambda: with_nodes(Gres="gpu:h100:2"), SITE),
            *("error", "nodes", ["2 a100 GPUs", "at most 0"]),
        ),
        (["--time=4:00:00"], lambda: with_partition(MaxTime="01:30:00"), SITE, "error", "time", ["240", "90 min"]),
        (["--time=2", "--signal-lead=120"], recorded, SITE, "error", "time", ["120 s", "at once"]),
        (["--time=3", "--signal-lead=120"], recorded, SITE, "warning", "time", ["60 s early"]),
        ([], recorded, site(save_seconds=200.0), "error", "time", ["120 s", "200.0 s"]),
        ([], recorded, site(save_seconds=60.0), "error", "preemption", ["GraceTime 10", "KillWait 5", "60.0 s"]),
        ([], recorded, site(save_seconds=12.0), "warning", "preemption", ["only KillWait"]),
        ([], lambda: with_partition(PreemptMode="CANCEL"), SITE, "warning", "preemption", ["another job"]),
        ([], lambda: with_partition(PreemptMode="SUSPEND,GANG"), SITE, "warning", "preemption", ["stopped in place"]),
        ([], lambda: with_config(JobRequeue="0"), SITE, "warning", "requeue", ["JobRequeue=0"]),
        ([], lambda: dataclasses.replace(recorded(), sacct=False), SITE, "warning", "accounting", ["no sacct"]),
        (
            [],
            recorded,
            site(environment={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}),
            *("warning", "torchrun", ["TIMEOUT=5", "125 s", "unset"]),
        ),
        ([], recorded, site(trouble="/runs: Permission denied"), "error", "run.root", ["Permission denied"]),
        ([], recorded, site(file_system="ext4"), "warning", "run.root", ["ext4", "--on-node"]),
        ([], recorded, site(links_are_exclusive=False), "error", "run.root", ["link(2)"]),
        ([], recorded, site(free_bytes=300_000_000), "error", "space", ["0.3 GB free", "0.4 GB"]),
        (["checkpoint.keep_every=100"], recorded, SITE, "warning", "space", ["keep_every", "every 100 steps"]),
        (
            *([], recorded, site(missing_images="data/MNIST/raw/train-images-idx3-ubyte")),
            *("warning", "images", ["data/MNIST/raw", "ddpm_dist.fetch mnist", "without internet"]),
        ),
        (["data.download=false"], recorded, site(missing_images="data/x"), "error", "images", ["data/x: missing"]),
        (
            *(
                ["data.name=folder", "data.root=photos", "data.image_size=28", "data.num_workers=0"],
                recorded,
                site(missing_images="photos"),
            ),
            *("error", "images", ["data.root=photos", "no such folder"]),
        ),
        ([], recorded, site(tracking_trouble="timed out"), "error", "MLflow", ["timed out"]),
        ([], recorded, site(tracking_uri="http://127.0.0.1:5000"), "error", "MLflow", ["another machine"]),
        ([], recorded, site(tracking_uri=None), "warning", "MLflow", ["SQLite on nfs4"]),
        ([], recorded, site(interfaces=("lo", "docker0")), "warning", "network", ["NCCL_SOCKET_IFNAME=^docker0"]),
        ([], recorded, site(python_file_system="ext4"), "warning", "python", ["ext4"]),
    ],
)
def test_each_misconfiguration_is_named(
    argv: list[str], cluster: Callable[[], Cluster], seen: Site, level: str, subject: str, words: list[str]
) -> None:
    findings = examine(request(*argv), cluster(), seen)
    wrong = [finding for finding in findings if finding.level != "ok"]
    named = [finding for finding in wrong if (finding.level, finding.subject) == (level, subject)]
    assert len(named) == 1, [str(finding) for finding in findings]
    assert all(word in named[0].text for word in words), named[0]
    assert len(str(named[0]).splitlines()) == 1
    assert len(wrong) == 1 or seen.save_seconds > 10, [str(finding) for finding in wrong]


def test_all_that_the_nodes_lack_is_named_and_nothing_is_said_to_be_there() -> None:
    findings = examine(request("--gpus-per-node=4", "--cpus-per-task=9"), recorded(), SITE)
    errors = [str(finding) for finding in findings if finding.level == "error"]
    assert len(errors) == 2
    assert "CPUs a node asked for: 0 node(s) have them, at most 4" in errors[0]
    assert "4 GPUs a node asked for: 0 node(s) have them, at most 2" in errors[1]
    assert not any(finding.subject == "GPUs" for finding in findings)


def test_the_signal_of_a_preemption_is_told() -> None:
    def told(cluster: Cluster) -> Finding:
        return next(finding for finding in examine(request(), cluster, SITE) if finding.subject == "preemption")

    assert "told by SIGTERM" in told(recorded()).text
    assert "told by --signal's USR2" in told(with_config(SlurmctldParameters="preempt_send_user_signal")).text
    assert told(with_config(PreemptType="preempt/none")).text == "none in this partition"


def test_excluded_nodes_do_not_count() -> None:
    findings = examine(request("--nodes=2"), recorded(), SITE, frozenset({"node1", "node2"}))
    assert [finding.subject for finding in findings if finding.level == "error"] == ["nodes"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5 sec", 5), ("10", 10), ("01:00:00", 3600), ("1-00:00:30", 86430), ("UNLIMITED", None), ("NONE", None)],
)
def test_times_as_scontrol_prints_them(text: str, seconds: int | None) -> None:
    assert seconds_in(text) == seconds


@pytest.mark.parametrize(
    ("gres", "count"), [("gpu:2", 2), ("gpu:a100:4(S:0-1)", 4), ("shm:1,gpu:a:1,gpu:b:2", 3), ("(null)", 0), ("gpu", 0)]
)
def test_gpus_of_a_node(gres: str, count: int) -> None:
    assert gpus_of({"Gres": gres}) == count


def test_the_site_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        config = load_config(None, [f"run.root={tmp_path / 'runs'}", f"tracking.uri={uri}", "model.channels=8"])
        found = look(config)
    assert (found.trouble, found.links_are_exclusive, found.tracking_uri) == ("", True, uri)
    assert "refused" in found.tracking_trouble
    assert found.save_seconds > 0
    assert list(tmp_path.iterdir()) == []
    assert found.file_system == file_system_of(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Not a directory"):
        measure(Path("/dev/null"), 10)


def test_the_checkpoint_is_as_large_as_foretold(tmp_path: Path) -> None:
    from harness import train

    run = train(1, tmp_path, "train.max_steps=1", "optim.warmup_steps=0")
    written = next((run / "checkpoints").glob("*.pt")).stat().st_size
    foretold = checkpoint_bytes(load_config(run / "config.yaml", []))
    assert written == pytest.approx(foretold, rel=0.1)


def test_without_slurm_it_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([]) == 78
    error = capsys.readouterr().err
    assert error.startswith("error: no scontrol here")
    assert len(error.splitlines()) == 1

"""Whether the disk, the tracking server, the network and Python are fit for a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from urllib.parse import urlparse

from launch.checks.case import Case, Finding
from launch.site import is_network


def check_run_root(case: Case) -> Iterator[Finding]:
    request, site = case.request, case.site
    root = request.config.directory.parent
    if site.trouble:
        yield Finding("error", "run.root", f"cannot be written: {site.trouble}")
    elif not site.links_are_exclusive:
        yield Finding("error", "run.root", f"{root} ({site.file_system}): link(2) is not exclusive; two could write")
    elif not is_network(site.file_system):
        text = f"{root} is on {site.file_system}, which looks local: do the nodes see it? `--on-node` tells"
        yield Finding("warning", "run.root", text)
    else:
        yield Finding("ok", "run.root", f"{root} on {site.file_system}, writable")


def check_space(case: Case) -> Iterator[Finding]:
    config, site = case.request.config.checkpoint, case.site
    need = site.checkpoint_bytes * (config.keep_last + 1)
    words = f"{_gigabytes(site.free_bytes)} free, {_gigabytes(need)} for {config.keep_last} checkpoints and a new one"
    if site.free_bytes < need:
        yield Finding("error", "space", f"{words}; lower checkpoint.keep_last or give another run.root")
    elif config.keep_every is not None:
        text = f"{words}, and {_gigabytes(site.checkpoint_bytes)} for ever every {config.keep_every} steps"
        yield Finding("warning", "space", f"{text} (checkpoint.keep_every)")
    else:
        yield Finding("ok", "space", f"{words} (quotas are not seen)")


def check_images(case: Case) -> Iterator[Finding]:
    """Whether the data set is where the job will look for it, as far as this machine sees the same folders."""
    data, missing = case.request.config.data, case.site.missing_images
    if not missing:
        yield Finding("ok", "images", f"data.name={data.name} in {data.root}" if data.name != "mnist5k" else data.name)
    elif data.name == "folder":
        yield Finding("error", "images", f"data.root={missing}: no such folder")
    else:
        text = f"{missing}: missing; python -m ddpm_dist.fetch {data.name} data.root={shlex.quote(data.root)}"
        if data.download:
            yield Finding("warning", "images", f"{text}, since nodes without internet cannot fetch it")
        else:
            yield Finding("error", "images", text)


def check_tracking(case: Case) -> Iterator[Finding]:
    site = case.site
    if not case.request.config.tracking.enabled:
        yield Finding("ok", "MLflow", "off")
    elif site.tracking_trouble:
        text = f"{site.tracking_uri}: {site.tracking_trouble}; training goes on without it, `sync` delivers later"
        yield Finding("error", "MLflow", text)
    elif site.tracking_uri is None and is_network(site.file_system):
        text = f"SQLite on {site.file_system}: several runs at once may wait for each other; a server is safer"
        yield Finding("warning", "MLflow", f"{text} (tracking.uri)")
    elif urlparse(site.tracking_uri or "").hostname in ("localhost", "127.0.0.1", "::1"):
        yield Finding("error", "MLflow", f"{site.tracking_uri}: on the nodes that is another machine; give its name")
    else:
        yield Finding("ok", "MLflow", site.tracking_uri or "mlflow.db in run.root")


def check_network(case: Case) -> Iterator[Finding]:
    virtual = [name for name in case.site.interfaces if name.startswith(("docker", "virbr", "br-", "cni", "tailscale"))]
    chosen = case.site.environment.get("NCCL_SOCKET_IFNAME")
    if case.request.nodes > 1 and case.request.gpus_per_node and virtual and not chosen:
        text = f"{', '.join(virtual)}: NCCL may choose it; export NCCL_SOCKET_IFNAME=^{','.join(virtual)}"
        yield Finding("warning", "network", text)
    else:
        yield Finding("ok", "network", f"NCCL_SOCKET_IFNAME={chosen}" if chosen else "nothing that NCCL would mistake")


def check_python(case: Case) -> Iterator[Finding]:
    if case.request.python is None and not is_network(case.site.python_file_system):
        text = f"this interpreter is on {case.site.python_file_system}, which looks local: do the nodes have it?"
        yield Finding("warning", "python", text)
    else:
        yield Finding("ok", "python", case.request.python or f"on {case.site.python_file_system}")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"

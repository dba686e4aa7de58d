"""What `launch.doctor` measures on real ranks: how fast they reach each other, and whether they share a folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ddpm_dist.errors import ExitCode
from ddpm_dist.parallel.connection import pick_device
from ddpm_dist.parallel.environment import read_environment
from ddpm_dist.parallel.ranks import Ranks

SIZES = (4 * 2**10, 2**20, 32 * 2**20)  # bytes: latency, a small bucket, DDP's larger ones
FILE_BYTES = 2**23


def probe(folder: Path, device_name: str, timeout_seconds: float, seconds: float) -> int:
    """Measure all-reduces and the folder; rank 0 prints what was found. Collective.

    Args:
        folder: run.root; made if it is not there.
        device_name: auto, cuda or cpu.
        timeout_seconds: a collective that takes longer is an error.
        seconds: how long the all-reduces go on.

    Returns:
        0, or 78 if some rank does not see what rank 0 wrote, or cannot write there itself.
    """
    env = read_environment()
    device = pick_device(device_name, env)
    ranks = Ranks(env, device, timeout_seconds, lambda: False)
    if ranks.is_zero:
        print(f"ok       ranks          {ranks.world_size} on {', '.join(dict.fromkeys(ranks.nodes))} ({device.type})")
    if ranks.world_size > 1:
        for size in SIZES:
            duration = _all_reduce_seconds(size, device, seconds / len(SIZES))
            if ranks.is_zero:
                speed = f"{size / duration / 1e6:.0f} MB/s" if size > SIZES[0] else "latency"
                print(f"ok       all-reduce     {size // 1024:>6} KiB in {duration * 1e3:.3f} ms ({speed})", flush=True)
    seen, wrote = _disk(folder, ranks, 3 * seconds)
    worst = _largest(torch.tensor([seen, wrote], dtype=torch.float64, device=device), ranks)
    ranks.leave()
    ok = max(worst) < float("inf")
    if ranks.is_zero:
        print(_about_folder(folder, *worst))
    return 0 if ok else int(ExitCode.CONFIG)


def _about_folder(folder: Path, seen: float, wrote: float) -> str:
    if seen == float("inf"):
        return f"error    run.root       {folder} is not shared: some rank does not see what rank 0 wrote"
    if wrote == float("inf"):
        return f"error    run.root       {folder} cannot be written by some rank"
    written = f"{FILE_BYTES // 2**20} MiB written, flushed and read in {wrote:.2f} s at worst"
    return f"ok       run.root       {folder}: rank 0's file seen by all within {seen:.2f} s; {written}"


def _all_reduce_seconds(size: int, device: torch.device, seconds: float) -> float:
    """The median time of one all-reduce. All ranks stop together, when rank 0's clock says that the time is up.

    Args:
        size: of the tensor, bytes.
        seconds: how long to go on.
    """
    data = torch.ones(size // 4, device=device)
    durations: list[float] = []
    begun = time.monotonic()
    go_on = torch.ones(1, device=device)
    while go_on.item() > 0:
        for _ in range(5):
            before = time.perf_counter()
            dist.all_reduce(data, op=dist.ReduceOp.MAX)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            durations.append(time.perf_counter() - before)
        go_on = torch.tensor([float(time.monotonic() - begun < seconds)], device=device)
        dist.broadcast(go_on, src=0)
    return sorted(durations)[len(durations) // 2]


def _disk(folder: Path, ranks: Ranks, patience_seconds: float) -> tuple[float, float]:
    """How this rank sees the folder. Collective.

    Returns:
        (seconds until rank 0's file was seen, seconds to write, flush and read a file of its own); inf if it failed.
    """
    # All ranks of a launch meet at one port, whose number is thus a name that they share and others do not.
    name = f".doctor-{os.environ.get('MASTER_PORT', os.getpid())}"
    beacon, own = folder / name, folder / f"{name}-{ranks.rank}"
    seen, wrote = float("inf"), float("inf")
    try:
        if ranks.is_zero:
            folder.mkdir(parents=True, exist_ok=True)
            beacon.write_text("seen?")
    except OSError:
        pass
    ranks.all_succeed(lambda: None)
    begun = time.monotonic()
    while time.monotonic() - begun < patience_seconds:
        if beacon.exists():
            seen = time.monotonic() - begun
            break
        time.sleep(0.05)
    try:
        data, begun = os.urandom(FILE_BYTES), time.monotonic()
        with own.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if own.read_bytes() == data:
            wrote = time.monotonic() - begun
        own.unlink()
    except OSError:
        pass
    ranks.all_succeed(lambda: None)
    if ranks.is_zero:
        beacon.unlink(missing_ok=True)
    return seen, wrote


def _largest(values: torch.Tensor, ranks: Ranks) -> list[float]:
    """The largest of every value over the ranks. Collective."""
    if ranks.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()

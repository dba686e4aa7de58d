"""Whether two versions of this project train to the same bits, on this machine.

    python tests/same_bits.py record --code ../before --out before.json     # a checkout of the version of before
    python tests/same_bits.py record --out after.json
    python tests/same_bits.py compare before.json after.json

`record` trains the recipes below with the code of a checkout and writes the digests of what each run ends with, and
the losses that it logged. `--only tiny` takes two minutes on two cores, everything about forty. Digests of another
machine, or of another version of torch, say nothing here. `--old-run DIR` also resumes a copy of an earlier run: make
one with `record --only old --keep DIR` at the older version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
QUIET = ("preview.num_images=0", "tracking.enabled=false", "train.device=cpu", "train.log_every=1")
TINY = (
    *("data.name=mnist5k", "data.batch_size=16", "elastic.shards=4", "model.channels=8", "model.dropout=0.1"),
    *("data.flip=true", "optim.grad_clip=0.5", "optim.warmup_steps=5", "optim.schedule=cosine", "ema.decay=0.99"),
    *("train.threads=1", "train.max_steps=24", "checkpoint.every=10"),
)
LOSS_TOLERANCE = 1e-6  # relative, of one step's logged loss


def recipes(data_root: str, bf16_steps: int, quickstart_steps: int) -> dict[str, tuple[int, tuple[str, ...]]]:
    """{name: (ranks, arguments)} of every run, the short ones first."""
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for precision in ("fp32", "bf16", "fp16"):
        for ranks in (1, 2, 4):
            for mode, micro in (("stream", "null"), ("stream", "2"), ("bitwise", "null")):
                name = f"tiny {precision} {mode} micro={micro} {ranks} ranks"
                keys = (f"train.precision={precision}", f"elastic.mode={mode}", f"train.micro_batch_size={micro}")
                found[name] = (ranks, (*TINY, *keys))
    found["old run resumed"] = (1, (*TINY, "train.precision=fp32", "optim.decay_steps=48"))
    for precision in ("fp32", "bf16"):
        for ranks in (1, 2):
            for mode in ("stream", "bitwise"):
                steps = bf16_steps if precision == "bf16" else 60
                keys = (f"train.precision={precision}", f"elastic.mode={mode}", f"train.max_steps={steps}")
                name = f"reference {precision} {mode} {ranks} ranks"
                found[name] = (ranks, (f"data.root={data_root}", "data.download=false", *keys))
    found["quickstart"] = (1, ("--config", "configs/quickstart.yaml", f"train.max_steps={quickstart_steps}"))
    return found


def train(code: Path, root: Path, ranks: int, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Run the train command of a checkout; returns the digests and losses of where it ends."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    keys = (*arguments, *QUIET, f"run.root={root}", "run.name=run")
    environment = os.environ | {"PYTHONPATH": str(code)}
    if ranks > 1:
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "ddpm_dist.train", *keys],
        cwd=code,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(keys)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return read_end(root / "run")


def read_end(run: Path) -> dict[str, Any]:
    import torch

    newest = max((run / "checkpoints").glob("step-*.pt"))
    state = torch.load(newest, map_location="cpu", weights_only=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    digests = {part: digest(state[part]) for part in ("step", "model", "ema", "optimizer", "scaler")}
    return {"digests": digests, "losses": {str(line["step"]): line["loss"] for line in lines}}


def digest(value: Any) -> str:
    """Of every key, type, shape and bit. Written for this tool, so that both versions are measured by one rule."""
    hasher = hashlib.sha256()

    def feed(item: Any) -> None:
        import torch

        if isinstance(item, torch.Tensor):
            hasher.update(f"{item.dtype}{tuple(item.shape)}".encode())
            hasher.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                hasher.update(f"{key}:".encode())
                feed(item[key])
        elif isinstance(item, list | tuple):
            for each in item:
                feed(each)
        else:
            hasher.update(repr(item).encode())

    feed(value)
    return hasher.hexdigest()[:16]


def record(args: argparse.Namespace) -> int:
    results: dict[str, Any] = {}
    for name, (ranks, arguments) in recipes(
        str(args.data_root.resolve()), args.bf16_steps, args.quickstart_steps
    ).items():
        if args.only and not name.startswith(args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            if name == "old run resumed":
                if args.old_run is None and args.keep is None:
                    continue
                if args.old_run is not None:
                    shutil.copytree(args.old_run, root / "run")
                    arguments = (*arguments, "train.max_steps=48")
            results[name] = train(args.code.resolve(), root, ranks, arguments)
            if args.keep is not None:
                shutil.copytree(root / "run", args.keep)
        print(name, results[name]["digests"], flush=True)
        args.out.write_text(json.dumps(results, indent=1))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Print a line a run; returns 1 if any run of both files differs, or the files have none in common."""
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    names = [name for name in before if name in after]
    wrong = 0
    for name in names:
        one, other = before[name], after[name]
        parts = [part for part, found in one["digests"].items() if other["digests"].get(part) != found]
        worst = max(relative(one["losses"][step], other["losses"].get(step)) for step in one["losses"])
        bad = bool(parts) or not worst <= LOSS_TOLERANCE
        wrong += bad
        verdict = f"DIFFERS in {', '.join(parts) or 'the logged loss'}" if bad else "same bits"
        print(f"{name:48} {verdict:30} logged loss within {worst:.1e}")
    print(f"{len(names)} runs compared, {wrong} differ")
    return 1 if wrong or not names else 0


def relative(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return abs(one - other) / abs(one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--code", type=Path, default=PROJECT)
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--only", help="runs whose names begin like this: tiny, old, reference, quickstart")
    recording.add_argument("--bf16-steps", type=int, default=60, help="of the reference recipe in bf16 [60]")
    recording.add_argument("--quickstart-steps", type=int, default=1800, help="[1800]")
    recording.add_argument("--data-root", type=Path, default=PROJECT / "data", help="holds MNIST/raw")
    recording.add_argument("--old-run", type=Path, help="a run directory of an older version, to resume a copy of")
    recording.add_argument("--keep", type=Path, help="keep the run directory there (with --only old)")
    recording.set_defaults(command=record)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.set_defaults(command=compare)
    args = parser.parse_args()
    return int(args.command(args))


if __name__ == "__main__":
    sys.exit(main())

"""What people type wrong on the way from git clone to a SLURM job, and what they are told.

mistakes.txt is the table, to be read and judged as a whole. A row has the command line as a person types it at the
root of a checkout, the whole message, and a line of facts: the exit code, and words of the message that say what is
wrong, where, and what would be valid. No file of the checkout, and above all none of a run, may be touched, except
those that the row names.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from harness import Job, call_unread, snapshot, wait_for_step
from PIL import Image

ROOT = Path(__file__).parents[1]
TOOLS = (
    # Programs that the scripts call.
    "bash",
    "cat",
    "cut",
    "date",
    "dirname",
    "env",
    "grep",
    "head",
    "make",
    "mkdir",
    "mktemp",
    "mv",
    "nproc",
    "readlink",
    "rm",
    "sed",
    "sleep",
    "sort",
    "tail",
    "touch",
    "tr",
    "uname",
    "wc",
)
TINY = """\
run: {name: tiny}
data: {name: mnist5k, batch_size: 8}
model: {channels: 8}
elastic: {shards: 4}
train: {max_steps: 4, device: cpu, threads: 1, precision: fp32, log_every: 1}
checkpoint: {every: 2}
preview: {num_images: 0}
tracking: {enabled: false}
"""
PAGE = "<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
WITHOUT = "import sys\nsys.modules['{}'] = None\n"  # Python runs a file of the name sitecustomize when it starts
NO_MLXTEND, NO_TORCH, NO_DIFFUSERS = (WITHOUT.format(package) for package in ("mlxtend", "torch", "diffusers"))
SBATCH = """\
#!/bin/sh
echo "sbatch: error: invalid partition specified: gpux" >&2
echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
exit 1
"""
CONTENTS = {"NO_MLXTEND": NO_MLXTEND, "NO_TORCH": NO_TORCH, "NO_DIFFUSERS": NO_DIFFUSERS, "SBATCH": SBATCH}
CONTENTS |= {"DEEP": "run: " + "[" * 3000}
WORDS = ("what", "where", "valid")


@dataclass(frozen=True)
class Mistake:
    """One row.

    Attributes:
        typed: the command line.
        code: the exit code.
        says: the whole output, up to `...` if it ends so. `HERE` stands for the folder of the checkout, LINE for the
            number of a line.
        words: of the message: `what` is wrong, `where`, and what would be `valid`.
        given: files that are there beforehand, {name: content}.
        may_change: names of files and folders that the command may make or change.
        marks: `torch` if the mistake is found only once torch is loaded. Such a row runs in a fork of a process that
            has loaded it already; all others run as they are typed.
    """

    typed: str
    code: int
    says: str
    words: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    may_change: list[str] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)


def read_table(text: str) -> list[Mistake]:
    """The rows of mistakes.txt: three lines each, with blank lines between them."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("$ "):
            typed, says, facts = block.rstrip("\n").split("\n")
            code, *rest = facts.strip().split(" | ")
            row = Mistake(typed.removeprefix("$ "), int(code), says)
            for fact in rest:
                name, _, value = fact.partition(" ")
                if name in WORDS:
                    row.words[name] = value
                elif name == "given":
                    file, _, content = value.partition("=")
                    row.given[file] = CONTENTS[content] if content in CONTENTS else ast.literal_eval(content)
                elif name == "may":
                    row.may_change.append(value.removeprefix("change "))
                else:
                    row.marks.add(fact)
            found.append(row)
    return found


MISTAKES = read_table((Path(__file__).parent / "mistakes.txt").read_text())


def write(path: Path, text: str) -> None:
    """A script can be executed if it starts like one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if text.startswith("#!") else 0o644)


def environment(here: Path) -> dict[str, str]:
    """No CUDA, no SLURM and no MLflow server, whatever this machine has. Only the programs in bin/ are there."""
    return {
        "PATH": f"{here / 'bin'}",
        "PYTHONPATH": f"{here / 'path'}:{ROOT}",
        "HOME": str(here),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LOCAL_SLURM_STATE": str(here / "cluster"),
    }


def run_as_typed(typed: str, here: Path) -> tuple[int, str]:
    """Returns (exit code, what was said)."""
    done = subprocess.run(
        ["bash", "-c", typed],
        cwd=here,
        env=environment(here),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def run_forked(typed: str, here: Path) -> tuple[int, str]:
    """The same for `[NAME=VALUE] python -m MODULE ...`, without the seconds that it takes to load torch."""
    words = shlex.split(typed)
    start = words.index("python")
    assert words[start + 1] == "-m"
    given = dict(word.split("=", 1) for word in words[:start])
    argv = (words[start + 2], words[start + 3 :], str(here), given)
    with Job(1, here.parent / "said.log", call_module, argv) as job:
        (code,) = job.wait(300)
        assert code is not None
        return code, job.output()


def call_module(module: str, argv: Sequence[str], here: str, given: Mapping[str, str]) -> int:
    """What `python -m` does with a module of ours. Runs in the fork."""
    os.chdir(here)
    sys.path.insert(0, here)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **given})
    at_start = Path(here) / "path" / "sitecustomize.py"
    if at_start.exists():
        exec(at_start.read_text())
    import torch

    torch.set_num_threads(1)
    return int(importlib.import_module(module).main(argv))


def make_checkout(here: Path) -> None:
    """A checkout with folders of pictures, and with a run that is finished: runs/tiny, with checkpoints at 2 and 4."""
    for name in ("launch", "slurm", "Makefile", "pyproject.toml", "constraints.txt"):
        (here / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", here / "configs")
    write(here / "tiny.yaml", TINY)
    (here / "bin").mkdir()
    for tool in TOOLS:
        (here / "bin" / tool).symlink_to(shutil.which(tool) or pytest.skip(f"{tool} is not installed"))
    for name, module in (("python", ""), ("python3", ""), ("torchrun", "-m torch.distributed.run ")):
        write(here / "bin" / name, f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
    for folder, count in (("pictures", 12), ("broken", 12), ("few", 3), ("empty", 0)):
        (here / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(here / folder / f"{number:02d}.png")
    write(here / "broken" / "05.png", PAGE)
    code, said = run_forked("python -m ddpm_dist.train --config tiny.yaml", here)
    assert code == 0, said
    for name, state in (("wide", {"out_conv.weight": torch.zeros(1, 16, 3, 3)}), ("other", {"head": torch.zeros(2)})):
        safetensors.torch.save_file(state, here / f"{name}.safetensors")
    young = here / "runs" / "young"  # its only attempt failed before its first checkpoint
    shutil.copytree(here / "runs" / "tiny", young)
    for path in (young / "status.json", young / "metrics.jsonl", *(young / "checkpoints").iterdir()):
        path.unlink()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("checkout")
    make_checkout(here)
    return here


@pytest.fixture
def here(checkout: Path, tmp_path: Path) -> Path:
    """A copy of the checkout for one command."""
    shutil.copytree(checkout, tmp_path / "here", symlinks=True)
    return tmp_path / "here"


def name_of(row: Mistake) -> str:
    return " ".join([row.typed.replace("python -m ", ""), *map(repr, row.given.values())])[:100]


def test_the_table_has_every_command_and_no_mistake_twice() -> None:
    typed = [(row.typed, str(row.given)) for row in MISTAKES]
    assert len(typed) == len(set(typed)) >= 40
    commands = [f"ddpm_dist.{name}" for name in ("train", "sample", "export", "status", "sync", "verify", "fetch")]
    commands += ["launch.submit", "launch.doctor", "launch/torchrun.sh", "slurm/train.sbatch", "slurm/local-cluster"]
    for command in [*commands, "make train"]:
        assert any(command in row.typed for row in MISTAKES), command


def touched(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def all_files(here: Path) -> dict[str, object]:
    """The content of each file, and that each folder is there."""
    folders = {str(path): "a folder" for path in here.rglob("*") if path.is_dir()}
    return {**folders, **snapshot(here)}


@pytest.mark.parametrize("row", MISTAKES, ids=name_of)
def test_the_message_says_what_where_and_what_is_valid_and_nothing_is_touched(row: Mistake, here: Path) -> None:
    for name, text in row.given.items():
        write(here / name, text)
    before = all_files(here)
    code, output = (run_forked if "torch" in row.marks else run_as_typed)(row.typed, here)
    lines = re.sub(r"^Makefile:\d+", "Makefile:LINE", output.replace(str(here), "HERE")).splitlines()
    if "torch" in row.marks:  # what an attempt says before it meets the mistake is no part of the message
        lines = [line for line in lines if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert lines[0].startswith(row.says[:-3]) if row.says.endswith("...") else lines == [row.says]
    assert "Traceback" not in output
    assert "Warning" not in output
    assert code == row.code
    assert row.words.keys() >= {"what", "where"}
    for word in row.words.values():
        assert word in lines[0]
    allowed = tuple(str(here / name) for name in row.may_change)
    changed = touched(before, all_files(here))
    assert [path for path in changed if not (allowed and path.startswith(allowed))] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("optim.lrr=3", 78, "error: command line: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (
            "elastic.shards=3 data.batch_size=9",
            78,
            "error: 2 ranks cannot share elastic.shards=3 evenly; valid numbers of ranks: 1, 3 "
            "(set elastic.shards to the largest number you plan, before the run starts)",
        ),
        (
            "data.name=mnist data.root=nowhere data.download=false",
            65,
            "error: nowhere/MNIST/raw/train-images-idx3-ubyte: missing; "
            "set data.root to where it is, or data.download=true",
        ),
    ],
)
def test_two_ranks_say_it_once(here: Path, arguments: str, code: int, says: str) -> None:
    """torchrun turns every exit code into 1, and launch/torchrun.sh gives the true one back."""
    command = f"--config tiny.yaml run.name=new {arguments}"
    by_torchrun, output = run_as_typed(f"torchrun --standalone --nproc_per_node 2 -m ddpm_dist.train {command}", here)
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [says], output
    assert by_torchrun == 1
    assert f"exitcode  : {code}" in output
    by_script, output = run_as_typed(f"NPROC=2 launch/torchrun.sh {command}", here)
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [says], output
    assert by_script == code
    assert "Traceback" not in output
    assert output.splitlines()[-1] == says, "nothing comes after the error"


def test_a_run_that_is_being_trained_is_left_alone(here: Path) -> None:
    run, arguments = here / "runs" / "busy", ["--config", "tiny.yaml", "run.name=busy", "train.max_steps=100000"]
    first: tuple[object, ...] = ("ddpm_dist.train", arguments, str(here), {})
    with Job(1, here.parent / "first.log", call_module, first) as job:
        wait_for_step(job, run, 3, attempt=1)
        code, output = run_forked(f"python -m ddpm_dist.train {shlex.join(arguments)}", here)
        assert code == 78
        says = r"error: runs/busy: is being trained by attempt 1 \(host \S+, pid \d+\); "
        says += r"stop that one first, or give another run\.name\n"
        assert re.fullmatch(says, output), output
        assert job.alive()
    assert [path.name for path in (run / "attempts").glob("*.json")] == ["00001.json"]


@pytest.mark.parametrize("question", ["--dry-run", "--help-config"])
def test_an_answer_that_nobody_reads_ends_quietly(question: str) -> None:
    """As in `... | head`."""
    done = call_unread([sys.executable, "-m", "ddpm_dist.train", question])
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("question", ["--dry-run", "--help-config", "--where"])
def test_an_answer_that_cannot_be_written_is_one_line(here: Path, question: str) -> None:
    code, output = run_as_typed(f"python -m ddpm_dist.train {question} 2>&1 >/dev/full", here)
    assert (code, output) == (70, "error: standard output: No space left on device\n")

"""Silent bugs put in on purpose, one at a time: does a test see each?

    python tests/mutants.py                      # all of mutants.toml; an hour on two cores
    python tests/mutants.py --only 'flip|dropout'    # those whose name or file matches
    python tests/mutants.py --list

Every bug of `tests/mutants.toml` is put into a copy of this checkout, and the tests named with it run there, the most
likely first. If all of them pass, the tests of the same wing run, then those of whole runs: a bug that nothing sees is
reported as a survivor, and wants a test. Where the code has changed so that a bug's old text is not found exactly
once, the tool says so before it runs anything: then the bug must be written anew for the code of today.

To add a bug, add an entry to `tests/mutants.toml` and run the tool with `--only` and a part of its name.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
WHOLE_RUNS = ("tests/training", "tests/distributed", "tests/faults/test_kills.py")
TIMEOUT_SECONDS = 600  # of one call of pytest; a bug may make a run wait for ever
PASSED, FAILED = 0, 1  # pytest's exit codes; the others say that no test was judged


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: what is wrong with the code, in a few words.
        file: relative to the checkout.
        old, new: the text that is replaced, which the file must have exactly once, and what replaces it.
        tests: arguments of one call of pytest each, the most likely to see the bug first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def calls(self) -> Iterable[str]:
        """The named tests, then wider and wider ones."""
        top, wing, *_ = self.file.split("/")
        folder = "tests/launch" if top == "slurm" else f"tests/{wing}"
        return [*self.tests, *([folder] if (PROJECT / folder).is_dir() else []), *WHOLE_RUNS]


@dataclass(frozen=True)
class Verdict:
    """What became of a bug.

    Attributes:
        seen_by: the first test that failed, and why; "" for a survivor.
        named: whether a call named with the bug saw it, rather than a wider one.
        broken: what pytest said where it judged nothing, as when the bug keeps the code from being imported.
    """

    mutant: Mutant
    seen_by: str = ""
    named: bool = False
    broken: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        fate = (
            f"BROKEN    {self.broken}" if self.broken else f"seen by   {self.seen_by}" if self.seen_by else "SURVIVED"
        )
        wider = "" if self.named or not self.seen_by else "  (not by the tests named with it)"
        return f"{self.mutant.file:34} {self.mutant.name:62} {self.seconds:4.0f} s  {fate}{wider}"


def read_list(path: Path = LIST) -> list[Mutant]:
    """The bugs of the list.

    Raises:
        SystemExit: a bug's old text is not found exactly once, its tests are not there, or two bugs have one name.
    """
    entries = tomllib.loads(path.read_text())["mutant"]
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    wrong = []
    for mutant in mutants:
        source = PROJECT / mutant.file
        count = source.read_text().count(mutant.old) if source.exists() else 0
        if count != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.name}: {mutant.file} has its old text {count} times")
        wrong += [
            f"{mutant.name}: no {call.split()[0]}"
            for call in mutant.tests
            if not (PROJECT / call.split()[0].split("::")[0]).exists()
        ]
    if len({mutant.name for mutant in mutants}) < len(mutants):
        wrong.append("two bugs of one name")
    if wrong:
        raise SystemExit("\n".join(wrong))
    return mutants


def copy_checkout(target: Path) -> None:
    """All that git knows or does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (PROJECT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, target / name)


def run_tests(checkout: Path, call: str) -> tuple[int, str]:
    """(pytest's exit code, the first test that failed and why). A call that does not end counts as failed."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        # A fork of this process, which has imported torch already.
        process = multiprocessing.get_context("fork").Process(target=_pytest, args=(checkout, call, output.name))
        process.start()
        process.join(TIMEOUT_SECONDS)
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it has started
            process.join()
            return FAILED, f"{call} (did not end)"
        text = output.read()
    assert process.exitcode is not None
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", text, re.MULTILINE)
    why = re.search(r"^E +(.*)$", text, re.MULTILINE)
    if failed is None:
        return process.exitcode, " | ".join(text.splitlines()[-3:])
    return process.exitcode, f"{failed[1]}: {why[1][:120] if why else ''}"


def _pytest(checkout: Path, call: str, output: str) -> None:
    os.setsid()
    del sys.modules["__main__"].__file__  # a fork server would import this file in every rank
    descriptor = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(checkout)
    os.environ.update(PYTHONPATH=str(checkout), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    sys.path.insert(0, str(checkout))
    sys.dont_write_bytecode = True  # two states of a file may be of one second and one size
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(call)]))


def judge(mutant: Mutant, checkout: Path, wider: bool) -> Verdict:
    """Put the bug into the copy, run tests until one fails, and take it out again."""
    path, begun = checkout / mutant.file, time.monotonic()
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        for number, call in enumerate(mutant.calls() if wider else mutant.tests):
            code, first = run_tests(checkout, call)
            took = time.monotonic() - begun
            if code == FAILED:
                return Verdict(mutant, first, named=number < len(mutant.tests), seconds=took)
            if code != PASSED:
                return Verdict(mutant, broken=f"pytest ended with {code}: {first}", seconds=took)
        return Verdict(mutant, seconds=time.monotonic() - begun)
    finally:
        path.write_text(sound)


def check_named_tests(mutants: Iterable[Mutant], checkout: Path) -> None:
    """Raises SystemExit if named tests fail without any bug: they would seem to see every one."""
    failing = []
    for call in dict.fromkeys(call for mutant in mutants for call in mutant.tests):
        code, first = run_tests(checkout, call)
        if code != PASSED:
            failing.append(f"without any bug, `pytest {call}` ends with {code}: {first}")
    if failing:
        raise SystemExit("\n".join(failing))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="bugs whose name or file matches")
    parser.add_argument("--list", action="store_true", help="print the bugs and run nothing")
    parser.add_argument("--named", action="store_true", help="run the named tests alone, no wider ones")
    parser.add_argument("--no-check", action="store_true", help="do not first run the named tests without any bug")
    args = parser.parse_args()
    chosen = [mutant for mutant in read_list() if re.search(args.only, f"{mutant.file} {mutant.name}")]
    if args.list:
        for mutant in chosen:
            print(f"{mutant.file:34} {mutant.name}")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = Path(folder)
        copy_checkout(checkout)
        if not args.no_check:
            check_named_tests(chosen, checkout)
        verdicts = []
        for mutant in chosen:
            verdicts.append(judge(mutant, checkout, wider=not args.named))
            print(verdicts[-1], flush=True)
    unseen = sum(not verdict.seen_by for verdict in verdicts)
    print(f"{len(verdicts)} bugs, {len(verdicts) - unseen} seen, {unseen} not")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())

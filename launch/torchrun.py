"""Starts torchrun for launch/torchrun.sh, in this process, and ends as the run ended.

torchrun itself ends with 1 whatever its ranks say, prints tracebacks of its own after theirs, and leaves its ranks
alone at the third signal. Here the exit code is that of the run, the last lines say how to go on, and only the first
stop signal goes to the ranks: they save, whatever comes meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are loaded, Ctrl-C ends this without a traceback
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python looks for modules beside the script, in launch/

from ddpm_dist.command import exit_codes
from ddpm_dist.config import load_config
from ddpm_dist.errors import ExitCode, UserError
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.train import parse

TRAIN = "ddpm_dist.train"
HELP = f"""\
usage: [NPROC=N] [PYTHON=python] launch/torchrun.sh [ARGUMENTS OF python -m ddpm_dist.train]

Train with several ranks on this machine: torchrun with the right flags.

    launch/torchrun.sh --config configs/mnist.yaml optim.lr=1e-4

There is one rank for each GPU, or without GPUs for each core, but then at most 4; and always 1, 2,
4 or 8. In the environment, NPROC=N asks for N ranks, and PYTHON=... for another Python than the
first one on the PATH. `python -m ddpm_dist.train --help` lists the arguments. With --dry-run,
--where and --help-config no ranks are started.

Stop the run with Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2: it saves. The same command then goes
on at the very next step. The last lines say how the run stands.

{exit_codes((65, 70, 75, 76, 78), {0: "the run is finished", 130: "stopped with Ctrl-C before training began"})}
"""
ANSWERS = ("--dry-run", "--where", "--help-config")  # of one process; nothing is trained
UNUSED_SIGNAL = "SIGURG"  # torchrun takes over at least one signal; nobody sends this one to it
SAID_HERE = ("Received %s death signal", "Sending process %s closing signal", "failed (exitcode: %s)")


def main(argv: Sequence[str]) -> int:
    """Train with several ranks. Returns the exit code of the run.

    Args:
        argv: the number of ranks, the command of the user, and the arguments of the train command.
    """
    num_ranks, script, *arguments = argv
    if "-h" in arguments or "--help" in arguments:
        print(HELP, end="")
        return 0
    if any(answer in arguments for answer in ANSWERS):
        os.execv(sys.executable, [sys.executable, "-m", TRAIN, *arguments])
    if not num_ranks.isdecimal() or int(num_ranks) == 0:
        _say(f"error: NPROC={num_ranks}: expected a number of ranks, at least 1")
        return ExitCode.CONFIG
    stop = _Stop()
    with _word_of_rank_zero() as word:
        failed = _run(num_ranks, arguments, stop)
        code = _exit_code(word, failed, stop)
    for line in _last_lines(code, arguments, _as_typed(script, arguments)):
        _say(line)
    return code


@contextlib.contextmanager
def _word_of_rank_zero() -> Iterator[Path]:
    """An empty file into which rank 0 writes the exit code of the run: the one that the user names, or one of ours."""
    named = os.environ.get("DDPM_EXIT_CODE_FILE")
    with tempfile.TemporaryDirectory(prefix="ddpm-", ignore_cleanup_errors=True) as folder:
        path = Path(named or Path(folder) / "exit-code")
        with contextlib.suppress(OSError):  # without the file, what torchrun has seen must do
            path.write_text("")
        os.environ["DDPM_EXIT_CODE_FILE"] = str(path)
        yield path


def _exit_code(word: Path, failed: Mapping[int, int], stop: _Stop) -> int:
    """The exit code of the run: what rank 0 has said, or else what can be made of how the ranks ended."""
    with contextlib.suppress(OSError, ValueError):
        return int(word.read_text())
    for rank in sorted(failed):
        if failed[rank] in set(ExitCode):
            return failed[rank]
    if failed:
        return ExitCode.SOFTWARE
    return 128 + stop.received if stop.received else ExitCode.FINISHED


def _as_typed(script: str, arguments: Sequence[str]) -> str:
    """The command of the user, to be pasted into a shell."""
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in ("NPROC", "PYTHON") if os.environ.get(name)]
    return os.environ.get("DDPM_COMMAND") or " ".join([*variables, shlex.join([script, *arguments])])


class _Stop:
    """The stop signals: torchrun passes the first one on to the ranks; further ones are only answered.

    Attributes:
        received: the first signal; None if none has come.
        reaches_ranks: whether torchrun is there to pass it on.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.reaches_ranks = False
        for name in os.environ["PET_SIGNALS_TO_HANDLE"].split(","):
            number = signal.Signals[name.strip()]
            # nohup has SIGHUP ignored, and it stays ignored.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        new_line = "\n" if os.isatty(2) else ""  # a progress bar may stand in this one
        if self.received is not None:
            _say(f"{new_line}{signal.Signals(number).name} again: the run is still being saved; please wait")
            return
        self.received = signal.Signals(number)
        if not self.reaches_ranks:
            _say(f"{new_line}stopping ({self.received.name}) before training begins")
        else:
            _say(f"{new_line}stopping ({self.received.name}): the ranks finish their step and save; please wait")
            from torch.distributed.elastic.multiprocessing import SignalException

            raise SignalException(f"got {self.received.name}", sigval=self.received)


def _run(num_ranks: str, arguments: Sequence[str], stop: _Stop) -> Mapping[int, int]:
    """Run torchrun until all ranks have ended.

    Returns:
        {rank: exit code} of those ranks that failed, as far as torchrun knows them; -N for one that signal N ended.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(_is_news)
    # --standalone finds a free port, so that two runs on one machine do not clash.
    options = ["--standalone", f"--nproc-per-node={num_ranks}", f"--signals-to-handle={UNUSED_SIGNAL}"]
    try:
        stop.reaches_ranks = True
        if stop.received is None:
            torchrun.run(torchrun.parse_args([*options, "-m", TRAIN, *arguments]))
    except SignalException:
        pass
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            # After one rank has failed, torchrun ends the others by SIGTERM.
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                _say(f"rank {rank} (pid {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}")
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    finally:
        stop.reaches_ranks = False
    return {}


def _is_news(record: logging.LogRecord) -> bool:
    """Whether torchrun logs something that is not said here in other words."""
    return not str(record.msg).startswith(SAID_HERE)


def _last_lines(code: int, arguments: Sequence[str], typed: str) -> list[str]:
    """How the run stands, and how to go on. Nothing if the trainer has said all: it is finished, or what to mend."""
    if code in (ExitCode.FINISHED, ExitCode.DATA, ExitCode.NO_PROGRESS, ExitCode.CONFIG):
        return []
    status: Mapping[str, Any] = {}
    with contextlib.suppress(UserError, OSError):
        args = parse(arguments)
        status = RunDirectory(load_config(args.config, args.overrides).directory).read_status()
    saved = status.get("saved_step")
    stands = f"step {saved} is saved" if saved else "no step is saved yet"
    how = "stopped" if code == ExitCode.PREEMPTED or code > 128 else f"failed with exit code {code}"
    return [f"{how}; {stands}. To go on, give the same command again:", f"  {typed}"]


def _say(line: str) -> None:
    """Print a line on standard error. One that cannot be written is lost, and changes nothing."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

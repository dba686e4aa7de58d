"""What happened to a run: its attempts, where they ran, how they ended, and when it will be finished.

    python -m ddpm_dist.status runs/mnist runs/cifar10
    python -m ddpm_dist.status --json runs/mnist

goodput  the share of the wall time of all attempts that went into steps that counted. The rest went
         into steps that were trained again after a kill, and into starting, saving, drawing
         previews and waiting for lost ranks. An attempt's time begins when it claims the run:
         the wait for a machine and the start of Python are not in it.
lost     steps that a later attempt trained again, or must, as far as metrics.jsonl knows them.
ETA      the steps that are left, times the time that a step took recently.

A node is named if at least two attempts died on it, and markedly more with it than without it. An
attempt died if it was killed, crashed, lost its node, or failed with exit code 70.
Nothing is written, and no run is disturbed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ddpm_dist.command import CommandLine, exit_codes, nobody_reads, refuse
from ddpm_dist.errors import UserError
from ddpm_dist.history.nodes import compress
from ddpm_dist.history.report import AttemptReport, Report, read_report

HEADINGS = ("attempt", "started", "took", "ranks", "nodes", "steps", "saved", "lost", "how it ended")
DEATH = "a kill, a crash or a lost node"  # an attempt that died could not say which
MAX_REASON, MAX_NODES = 80, 40  # characters in the table; --json gives the whole text
ALIGNED_RIGHT = ("attempt", "took", "ranks", "steps", "saved", "lost")


EPILOG = exit_codes(
    (78, 130), {0: "all runs are reported", 65: "one of the directories holds no run", 70: "a file cannot be read"}
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = CommandLine(prog="python -m ddpm_dist.status", description=__doc__, epilog=EPILOG)
    parser.add_argument("run_directories", type=Path, nargs="+", metavar="RUN_DIR", help="directories of runs")
    parser.add_argument("--json", action="store_true", help="the same facts as a JSON list, one object for each run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a report of each run directory. Returns the exit code."""
    try:
        args = parse(argv)
    except UserError as error:
        return refuse(error)
    try:
        return _print_all(args.run_directories, args.json)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return nobody_reads()


def _print_all(paths: Sequence[Path], as_json: bool) -> int:
    worst, reports = 0, []
    # Side by side, since a run is watched for some seconds if nothing else says whether it is alive.
    with ThreadPoolExecutor(8) as threads:
        for number, future in enumerate([threads.submit(read_report, path) for path in paths]):
            try:
                report = future.result()
            except (UserError, OSError) as error:
                worst = max(worst, refuse(error))
                continue
            reports.append(report)
            if not as_json:
                print(("\n" if number else "") + "\n".join(describe(report)), flush=True)
    if as_json:
        print(json.dumps([report.as_json() for report in reports], indent=2))
    return worst


def describe(report: Report) -> list[str]:
    """A report as lines of text: a headline, a table of attempts, totals, and advice."""
    lines = [_headline(report)]
    if report.attempts:
        lines += _table(report.attempts)
    lines += [f"  {line}" for line in (_totals(report), _outlook(report)) if line]
    lines += [f"  {suspicion}" for suspicion in report.suspicions]
    return lines + ([f"  {report.nodes_note}"] if report.nodes_note else [])


def _headline(report: Report) -> str:
    reason = DEATH if report.state == "died" else report.reason
    where = "" if report.step is None else f" at step {report.step}"
    if report.step is not None and report.target:
        where += f" of {report.target} ({report.step / report.target:.1%})"
    saved = "" if report.saved_step is None else f", step {report.saved_step} is saved"
    return f"{report.run}: {report.state}{where}{saved}" + (f": {reason}" if reason else "")


def _table(attempts: Sequence[AttemptReport]) -> list[str]:
    rows = [HEADINGS, *(_row(each) for each in attempts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if heading in ALIGNED_RIGHT else cell.ljust(width)
            for heading, cell, width in zip(HEADINGS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _row(attempt: AttemptReport) -> tuple[str, ...]:
    record = attempt.record
    steps = "-" if record.start_step is None else f"{record.start_step} -> {attempt.reached}"
    return (
        str(record.number),
        "-" if record.started is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started)),
        "-" if record.started is None else duration(attempt.seconds),
        "-" if record.world_size is None else str(record.world_size),
        _nodes(record.nodes),
        steps,
        "-" if record.saved_step is None else str(record.saved_step),
        str(attempt.lost),
        _ending(attempt),
    )


def _nodes(nodes: Sequence[str]) -> str:
    names = compress(nodes)
    if not names:
        return "-"
    return names if len(names) <= MAX_NODES else f"{len(nodes)} nodes from {nodes[0]} on"


def _ending(attempt: AttemptReport) -> str:
    record = attempt.record
    words = {"died": f"died: {DEATH}", "left": "ended before it began to train", "unknown": "not known"}
    said = words.get(record.how, record.how)
    if record.reason and record.how != "finished":
        said += f": {_without_middle(record.reason)}"
    return said + (f" (on {record.failed_node})" if record.failed_node and len(record.nodes) > 1 else "")


def _without_middle(text: str) -> str:
    """A reason that fits the table. The middle is left out: the messages of gloo and NCCL are long, and the ranks
    that did not answer are named at their end.
    """
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON // 2]} ... {text[-MAX_REASON // 2 :]}"


def _totals(report: Report) -> str:
    count = len(report.attempts)
    if not count:
        return ""
    took = f"{duration(report.seconds)} in {count} attempt{'s' if count > 1 else ''}"
    if report.goodput is None or report.lost_share is None:
        return f"goodput not known; {took}"
    other = max(0.0, 1 - report.goodput - report.lost_share)
    lost = sum(each.lost for each in report.attempts)
    return (
        f"goodput {report.goodput:.1%} of {took}; {report.lost_share:.1%} went into {lost} lost steps, "
        f"{other:.1%} into starting, saving and the rest"
    )


def _outlook(report: Report) -> str:
    if report.steps_left is None:
        return ""
    left, job = f"{report.steps_left} steps left", report.requeued_job
    if report.seconds_left is None or report.seconds_per_step is None:
        if report.state == "running":
            return f"ETA not known, {left}"
        return f"{left}; {'the same command' if job is None else f'the requeued job {job}'} resumes it"
    left += f" at {report.seconds_per_step:.3g} s each"
    if report.state == "running":
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(time.time() + report.seconds_left, 2.0**36)))
        return f"ETA {at}, in {duration(report.seconds_left)}: {left}"
    how = "it is resumed by the same command" if job is None else f"SLURM starts the requeued job {job} again"
    return f"{duration(report.seconds_left)} more once {how}: {left}"


def duration(seconds: float) -> str:
    """Seconds as `4.2 s`, `3 min 05 s`, `1 h 02 min` or `2 d 03 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute} min {second:02d} s"
    return f"{days} d {hour:02d} h" if days else f"{hour} h {minute:02d} min"


if __name__ == "__main__":
    sys.exit(main())

"""Whether a job that is interrupted has time to save, and comes back."""

from __future__ import annotations

from collections.abc import Iterator

from launch.checks.case import Case, Finding
from launch.cluster import seconds_in

EARLY_SECONDS = 60  # SLURM may send --signal so much earlier than asked for
MARGIN_SECONDS = 1.0  # a GraceTime was seen to be shorter than it says by so much


def check_time(case: Case) -> Iterator[Finding]:
    request, partition = case.request, case.partition
    most, default = seconds_in(partition.get("MaxTime", "")), seconds_in(partition.get("DefaultTime", ""))
    if request.minutes is None:
        if default is None and most is None:
            yield Finding("ok", "time", "no limit")
            return
        limit = default if default is not None else most or 0
        yield Finding("warning", "time", f"no --time given: the partition's default, {limit // 60} min, counts")
    else:
        limit = request.minutes * 60
    if most is not None and limit > most:
        yield Finding("error", "time", f"--time {limit // 60} min: the partition allows {most // 60} min")
        return
    lead = request.signal_seconds
    if lead >= limit:
        yield Finding(
            "error", "time", f"--signal-lead {lead} s: as long as the limit, {limit} s: it would stop at once"
        )
    elif lead + EARLY_SECONDS >= limit:
        yield Finding(
            "warning", "time", f"--signal-lead {lead} s: SLURM may send it {EARLY_SECONDS} s early; limit {limit} s"
        )
    elif lead < case.site.save_seconds + MARGIN_SECONDS:
        yield Finding(
            "error", "time", f"--signal-lead {lead} s: a save takes {case.site.save_seconds:.1f} s; give more"
        )
    else:
        yield Finding("ok", "time", f"limit {limit // 60} min, told to save {lead} s before")


def check_preemption(case: Case) -> Iterator[Finding]:
    mode = case.cluster.preempt_mode(case.partition)
    if mode.startswith("OFF"):
        yield Finding("ok", "preemption", "none in this partition")
        return
    if "SUSPEND" in mode or "GANG" in mode:
        yield Finding("warning", "preemption", f"PreemptMode={mode}: jobs are stopped in place; ranks may time out")
        return
    if "CANCEL" in mode:
        yield Finding("warning", "preemption", "PreemptMode=CANCEL: comes back as another job, with another id")
    grace = seconds_in(case.partition.get("GraceTime", "0")) or 0
    kill = seconds_in(case.cluster.config.get("KillWait", "30 sec")) or 0
    save = case.site.save_seconds + MARGIN_SECONDS
    words = f"GraceTime {grace} s + KillWait {kill} s; a save takes {case.site.save_seconds:.1f} s"
    if save > grace + kill:
        yield Finding("error", "preemption", f"{words}: killed before it is saved; set checkpoint.every_seconds")
    elif save > grace:
        yield Finding("warning", "preemption", f"{words}: only KillWait leaves time for it")
    else:
        user = "preempt_send_user_signal" in case.cluster.config.get("SlurmctldParameters", "")
        signal = "--signal's USR2" if user else "SIGTERM"
        yield Finding("ok", "preemption", f"{words}; told by {signal}")


def check_requeue(case: Case) -> Iterator[Finding]:
    if case.cluster.config.get("JobRequeue", "1") == "0":
        yield Finding(
            "warning", "requeue", "JobRequeue=0: we ask for --requeue; where refused a successor is submitted"
        )
    else:
        yield Finding("ok", "requeue", f"allowed; at most {case.request.max_requeues} times")


def check_accounting(case: Case) -> Iterator[Finding]:
    if case.cluster.sacct:
        yield Finding("ok", "accounting", "sacct answers")
    else:
        yield Finding("warning", "accounting", "no sacct: states of ended jobs are forgotten; status.json keeps them")


def check_shutdown(case: Case) -> Iterator[Finding]:
    given = case.site.environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    grace = seconds_in(case.partition.get("GraceTime", "0")) or 0
    need = max(grace, case.request.signal_seconds) + (seconds_in(case.cluster.config.get("KillWait", "30 sec")) or 0)
    if given is not None and (not given.isdigit() or int(given) < need):
        text = f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={given}: torchrun would kill sooner than SLURM ({need} s); unset it"
        yield Finding("warning", "torchrun", text)
    else:
        yield Finding("ok", "torchrun", f"leaves workers {given or need} s to save")

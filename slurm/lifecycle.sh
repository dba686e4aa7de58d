# shellcheck shell=bash
# Sourced by train.sbatch, by requeue.sh and by the batch script that launch.submit writes: how a batch shell waits, and
# what SLURM says of its job, as questions with names. Needs bash, sed, coreutils and scontrol, and no container.
#
# Jobs that run or wait while a checkout is upgraded call wait_through_signals by its name: keep it.

# Waits until a child process has ended, and returns its exit code. A signal that this shell has a trap for ends the
# builtin `wait`, but not the process that it waits for.
wait_through_signals() { # PID
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# The id that scontrol takes for this job: one task of an array is JOB_TASK.
job_id() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# Reads SLURM's record of this job into $about_job, one line of KEY=VALUE words, for the questions below. It fails where
# the controller does not answer. The time format of the user would hide what is a date.
about_job=${about_job:-}
ask_about_job() {
    about_job=$(SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$(job_id)")
    [ -n "$about_job" ]
}

# The value of a key, up to the next blank.
of_job() { # KEY
    tr ' ' '\n' <<<"$about_job" | sed -n "s/^$1=//p" | head -n 1
}

# The value of a key whose value may hold blanks, like a path: up to the next key.
path_of_job() { # KEY
    sed -E 's/ +([A-Z][A-Za-z]*=)/\n\1/g' <<<"$about_job" | sed -n "s/^$1=//p" | head -n 1
}

# Whether SLURM has ended this attempt, or is about to. SIGNALING, SUSPENDED and the like go on.
is_over() {
    case $(of_job JobState) in
        *COMPLETING* | COMPLETED | CANCELLED | FAILED | TIMEOUT | NODE_FAIL | PREEMPTED | DEADLINE | OUT_OF_MEMORY) ;;
        PENDING | REQUEUE*) ;;
        *) return 1 ;;
    esac
}

hit_time_limit() { [ "$(of_job Reason)" = TimeLimit ]; }

node_failed() { [ "$(of_job Reason)" = NodeDown ]; }

# From the moment of a preemption on PreemptTime is a date, which begins with the year; before it is None.
is_preempted() { [[ $(of_job PreemptTime) == [0-9]* ]]; }

may_be_requeued() { [ "$(of_job Requeue)" = 1 ]; }

# Whether SLURM has already ordered the restart that comes after this one.
is_requeued() {
    local restarts
    restarts=$(of_job Restarts)
    [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

# Whether an exit code, as a shell gives it to a process that a signal ended, tells of a signal that asks to stop.
ended_by_stop_signal() { # EXIT_CODE
    case $1 in
        129 | 130 | 131 | 138 | 140 | 143) ;; # 128 and SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM
        *) return 1 ;;
    esac
}

#!/usr/bin/env bash
# Decides what comes after an attempt: nothing more, or a restart of the job. The batch shells of train.sbatch and of
# launch.submit call it, outside any container: it needs bash, sed, awk, coreutils and scontrol.
#
#   requeue.sh unstarted "" EXIT_CODE              if the trainer cannot even say which run it is
#   requeue.sh begin RUN_DIR                       before the trainer starts; fails if the job has come back too often
#   requeue.sh told RUN_DIR                        when SIGTERM has come, while the trainer saves
#   requeue.sh end RUN_DIR EXIT_CODE COMMAND...    when the launcher has ended, with its exit code; COMMAND submits a
#                                                  successor of the job if SLURM does not requeue it
#
# It reads status.json and $DDPM_EXIT_CODE_FILE, and keeps RUN_DIR/slurm.log: a line for each beginning and each end.
# A job and its successors are a chain; the id of the first one, DDPM_CHAIN, names it. MAX_REQUEUES (1000) and
# TOTAL_MINUTES (0: no bound) hold for the chain as a whole.
# shellcheck source-path=SCRIPTDIR
set -uo pipefail
trap '' TERM INT HUP USR1 USR2 # SLURM signals this shell while it decides

# shellcheck source=lifecycle.sh
source "$(dirname "${BASH_SOURCE[0]}")/lifecycle.sh" || exit

action=$1 run=$2
shift 2
log=$run/slurm.log
job=$(job_id)
restart=${SLURM_RESTART_COUNT:-0}
chain=${DDPM_CHAIN:-$job}
code=""      # rank 0's exit code; empty if it left none
seconds=0    # that this attempt has lasted
has_died=no  # whether this attempt died, where others were stopped
deaths_allowed=3 stalls_allowed=20

say() { echo "slurm: job $job, restart $restart: $*" >&2; }

# --- What the run says of itself

of_status() { # KEY
    sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$run/status.json" 2>/dev/null | head -n 1
}

# The last step that is saved; null before there is one.
saved_step() {
    local step
    step=$(of_status saved_step)
    echo "${step:-null}"
}

# The exit code of rank 0: from status.json if this very attempt wrote it, else what it left when there was no run to
# hold yet. Empty if it was killed and could leave none.
exit_code() {
    local left=""
    if [ "$(of_status slurm_job)" = "$SLURM_JOB_ID" ] && [ "$(of_status slurm_restart)" = "$restart" ]; then
        left=$(of_status exit_code)
    fi
    [ -n "${left#null}" ] || left=$(cat "${DDPM_EXIT_CODE_FILE:-/dev/null}" 2>/dev/null)
    echo "${left#null}"
}

# --- slurm.log

# The trainer refuses a run directory that is a link out of run.root, so nothing is written there.
leads_out_of_root() {
    [ -L "$run" ] && [[ $(readlink -f "$run") != "$(readlink -f "$(dirname "$run")")"/* ]]
}

# Adds a line. A disk that is full does not keep a job from coming back.
write() { # KEY=VALUE...
    ! leads_out_of_root && mkdir -p "$run" 2>/dev/null || return
    { echo "time=$(date +%s) chain=$chain job=$job restart=$restart $*" >>"$log"; } 2>/dev/null
}

# One fact about the attempts of this chain:
#   begun              how many have begun
#   last               the last one that has begun, as JOB/RESTART
#   last_began         when it began, in seconds since 1970; 0 if none has
#   open_since         the same, but 0 if its end is known
#   seconds            how long those that have ended lasted, all together
#   fruitless, deaths  how many in a row saved nothing new, up to the last one that has ended; and how many of them died
of_chain() { # FACT
    [ -f "$log" ] || { echo 0; return; }
    awk -v chain="$chain" -v saved="$(saved_step)" -v wanted="$1" '
        function field(name,    i) {
            for (i = 1; i <= NF; i++) if (index($i, name "=") == 1) return substr($i, length(name) + 2)
            return ""
        }
        field("chain") != chain { next }
        { fact["open_since"] = 0; fact["seconds"] += field("seconds") }
        field("event") == "begin" {
            fact["begun"]++
            # Lines of an earlier version call it life.
            fact["last"] = field("job") "/" (field("restart") != "" ? field("restart") : field("life"))
            fact["last_began"] = fact["open_since"] = field("time")
            if (began_at_step != field("saved")) fact["fruitless"] = fact["deaths"] = 0
            began_at_step = field("saved")
        }
        field("next") != "" { fact["fruitless"]++ }
        field("died") != "" { fact["deaths"]++ }
        END {
            if (began_at_step != saved) fact["fruitless"] = fact["deaths"] = 0
            print wanted in fact ? fact[wanted] : 0
        }' "$log"
}

# Whether the beginning of this attempt is in slurm.log.
is_logged() { [ "$(of_chain last)" = "$job/$restart" ]; }

# How many attempts in a row saved nothing new, not counting this one; or how many of them died. Where slurm.log cannot
# be written, every restart counts.
count_in_a_row() { # fruitless | deaths
    if is_logged; then of_chain "$1"; else echo "$restart"; fi
}

# --- How an attempt can end

stay_stopped() { # WHY EXIT_CODE
    write "event=end code=${code:-none} saved=$(saved_step) seconds=$seconds next=none"
    say "$1"
    exit "$2"
}

# A run that saves nothing new however often it comes back would come back for ever.
hold_stalls() { # WHY ATTEMPTS
    [ "$2" -lt "$stalls_allowed" ] ||
        stay_stopped "$1, and $2 attempts in a row saved nothing new: stays stopped" "${code:-1}"
}

# No further attempt beyond the user's bounds, whether SLURM orders it or this script. A slurm.log that cannot be
# written knows of none, so the restarts of this job count too.
hold_bounds() { # WHY ATTEMPTS_OF_THIS_JOB
    local attempts used
    attempts=$(of_chain begun)
    [ "$attempts" -ge "$2" ] || attempts=$2
    used=$((seconds + $(of_chain seconds)))
    if [ "$attempts" -gt "${MAX_REQUEUES:-1000}" ]; then
        stay_stopped "$1, but came back $((attempts - 1)) times already (MAX_REQUEUES): stays stopped" "${code:-1}"
    fi
    if [ "${TOTAL_MINUTES:-0}" -gt 0 ] && [ "$used" -ge $((TOTAL_MINUTES * 60)) ]; then
        stay_stopped "$1, but has used its $TOTAL_MINUTES minutes (TOTAL_MINUTES): stays stopped" "${code:-1}"
    fi
}

come_back() { # WHY COMMAND...
    local why=$1 mark=""
    shift
    hold_bounds "$why" $((restart + 1))
    hold_stalls "$why" $(($(count_in_a_row fruitless) + 1))
    [ "$has_died" = no ] || mark=" died=1"
    write "event=end code=${code:-none} saved=$(saved_step) seconds=$seconds next=again$mark"
    say "$why: requeued"
    if ! scontrol requeue "$job"; then
        submit_successor "$@"
    fi
    exit "${code:-1}" # after scontrol requeue nothing here is sure to run any more
}

# The successor must not take this job's variables for its own.
submit_successor() { # COMMAND...
    local name
    say "SLURM does not requeue it (PreemptMode=CANCEL or JobRequeue=0?): submits a successor"
    for name in ${!SLURM_@}; do [ "$name" = SLURM_CONF ] || unset "$name"; done
    SBATCH_EXPORT=ALL DDPM_CHAIN=$chain "$@" ||
        say "the successor could not be submitted (exit code $?); submit the run again by hand"
}

# What SLURM says of this attempt, and how long it has lasted.
look() {
    local began
    for _ in {1..24}; do # the controller may be busy, or be restarted at this moment
        ! ask_about_job || break
        sleep 5
    done
    began=$(of_chain last_began)
    seconds=$((began > 0 ? $(date +%s) - began : 0))
}

# --- The four actions

# At a restart an earlier attempt has started the trainer elsewhere, so this node is to blame, and the job leaves it. At
# the first start it is more likely that no node can start it, and coming back would not help.
unstarted() { # EXIT_CODE
    if [ "$restart" -gt 0 ] && [ "$restart" -lt "${MAX_REQUEUES:-1000}" ]; then
        say "${SLURMD_NODENAME:-this node} cannot start the trainer (exit code $1): requeued"
        scontrol requeue "$job"
    fi
    exit "$1"
}

begin() {
    local since last
    since=$(of_chain open_since)
    if [ "$since" -gt 0 ]; then
        # SLURM or the node killed the attempt before this one, so nobody wrote down its end: it lasted until its last
        # heartbeat, and SLURM ordered the restart.
        last=$(stat -c %Y "$run"/attempts/*.json 2>/dev/null | sort -n | tail -n 1)
        write "event=killed saved=$(saved_step) seconds=$((${last:-0} > since ? last - since : 0)) next=again"
    fi
    hold_bounds "requeued by SLURM" "$restart"
    write "event=begin saved=$(saved_step) nodes=$SLURM_JOB_NODELIST"
    hold_stalls "requeued by SLURM" "$(count_in_a_row fruitless)"
}

# At the time limit SLURM kills everything after KillWait seconds, this shell too, and perhaps before the launcher has
# ended. So the restart is ordered at once; it begins when this attempt is over, and then sees what became of it.
told() {
    look
    if ! is_requeued && is_over && hit_time_limit && may_be_requeued; then
        come_back "time limit reached" true
    fi
}

end() { # EXIT_CODE_OF_LAUNCHER COMMAND...
    local launcher=$1 why="killed before it could save"
    shift
    code=$(exit_code)
    rm -f "${DDPM_EXIT_CODE_FILE:-}"
    look
    if is_requeued; then
        say "SLURM has requeued it already"
        exit "${code:-1}"
    fi
    case $code in
        0) stay_stopped "finished" 0 ;;
        65 | 76 | 78) stay_stopped "exit code $code: stays failed" "$code" ;;
        75) why="preempted" ;;
    esac
    # A job that SLURM has ended is COMPLETING while this shell runs, whatever it will be called afterwards.
    if is_over; then
        ! hit_time_limit || come_back "time limit reached" "$@"
        ! node_failed || come_back "a node failed" "$@"
        ! is_preempted || come_back "$why" "$@"
        stay_stopped "cancelled: stays stopped" "${code:-1}"
    fi
    if was_stopped "$launcher"; then
        come_back "$why" "$@"
    fi
    after_a_death "$launcher" "$@"
}

# Whether this attempt ended because it was asked to stop. A signal that came before the launcher could listen has ended
# the launcher itself, and no rank has left an exit code.
was_stopped() { # EXIT_CODE_OF_LAUNCHER
    [ "$code" = 75 ] || { [ -z "$code" ] && { is_preempted || ended_by_stop_signal "$1"; }; }
}

after_a_death() { # EXIT_CODE_OF_LAUNCHER COMMAND...
    local launcher=$1 why
    shift
    has_died=yes
    if [ $(($(count_in_a_row deaths) + 1)) -ge "$deaths_allowed" ]; then
        why="exit code ${code:-none}, and $deaths_allowed attempts in a row died and saved nothing new"
        stay_stopped "$why: stays failed" "${code:-70}"
    fi
    come_back "exit code ${code:-none} (launcher $launcher)" "$@"
}

"$action" "$@"

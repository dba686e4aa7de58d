#!/usr/bin/env bash
# What comes after a life of a SLURM job: nothing, or another life. Called in the batch shell of train.sbatch and of
# launch.submit, outside any container: needs bash, sed, awk, coreutils and scontrol.
#
#   requeue.sh unstarted "" EXIT_CODE               where the trainer cannot even say which run it is
#   requeue.sh begin RUN_DIR                        before the trainer starts; fails where a bound is reached
#   requeue.sh told RUN_DIR                         when SIGTERM came, while the trainer saves
#   requeue.sh end RUN_DIR EXIT_CODE COMMAND...     after it; COMMAND submits a successor where SLURM cannot requeue
#
# Reads status.json and $DDPM_EXIT_CODE_FILE; keeps RUN_DIR/slurm.log, a line for each beginning and end of a life.
# MAX_REQUEUES (1000) and TOTAL_MINUTES (0: any) bound the lives, those of successors included (DDPM_CHAIN).
set -uo pipefail
trap '' TERM INT HUP USR1 USR2 # SLURM ends the old life while this still works
export SLURM_TIME_FORMAT=standard # for PreemptTime

action=$1 run=$2
shift 2
about="" state="" code="" died="" seconds=0
log=$run/slurm.log
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
life=${SLURM_RESTART_COUNT:-0}
chain=${DDPM_CHAIN:-$job}
deaths_allowed=3 stalls_allowed=20

say() { echo "slurm: job $job, life $life: $*" >&2; }
status() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$run/status.json" 2>/dev/null | head -n 1; }
saved() { local step; step=$(status saved_step); echo "${step:-null}"; }
of_job() { sed -n "s/^$1=//p" <<<"$about" | head -n 1; }
# Nothing is written through a link out of run.root, which the trainer refuses. A full disk is no reason to stop.
leads_out() { [ -L "$run" ] && [[ $(readlink -f "$run") != "$(readlink -f "$(dirname "$run")")"/* ]]; }
write() {
    ! leads_out && mkdir -p "$run" 2>/dev/null || return
    { echo "time=$(date +%s) chain=$chain job=$job life=$life $*" >>"$log"; } 2>/dev/null
}
# Sums and counts over the lines of this chain; $1 is the last awk rule.
of_chain() {
    [ -f "$log" ] || { echo 0; return; }
    awk -v chain="chain=$chain" '
        function field(name,    i) {
            for (i = 1; i <= NF; i++) if (index($i, name "=") == 1) return substr($i, length(name) + 2)
            return ""
        }
        $2 != chain { next }
        '"$1" "$log"
}

# What an earlier life could do is the fault of this node; what never worked would never work.
unstarted() {
    if [ "$life" -gt 0 ] && [ "$life" -lt "${MAX_REQUEUES:-1000}" ]; then
        say "${SLURMD_NODENAME:-this node} cannot start the trainer (exit code $1): requeued"
        scontrol requeue "$job"
    fi
    exit "$1"
}

begin() {
    # A life that SLURM or its node killed has left no end: it lasted until its last heartbeat.
    local open since last
    open=$(of_chain '{ event = field("event"); since = field("time") } END { print event == "begin" ? since : 0 }')
    if [ "$open" -gt 0 ]; then
        last=$(stat -c %Y "$run"/attempts/*.json 2>/dev/null | sort -n | tail -n 1)
        since=$((${last:-0} > open ? last - open : 0))
        write "event=killed saved=$(saved) seconds=$since next=again" # SLURM has ordered the next one: this
    fi
    bound "requeued by SLURM" "$life"
    write "event=begin saved=$(saved) nodes=$SLURM_JOB_NODELIST"
    stalled "requeued by SLURM" "$(without_progress)"
}

# The exit code of rank 0: from status.json if this very life wrote it, else as left before there was a run to hold;
# empty after a death without a word.
exit_code() {
    local code=""
    if [ "$(status slurm_job)" = "$SLURM_JOB_ID" ] && [ "$(status slurm_restart)" = "$life" ]; then
        code=$(status exit_code)
    fi
    [ -n "${code#null}" ] || code=$(cat "${DDPM_EXIT_CODE_FILE:-/dev/null}" 2>/dev/null)
    echo "${code#null}"
}

# Lives in a row before this one that saved nothing new; $1=died: those of them that died. All where none is known.
without_progress() {
    is_logged || { echo "$life"; return; }
    of_chain '
        field("event") == "begin" { if (start != field("saved")) count = 0; start = field("saved") }
        field("'"${1:-next}"'") != "" { count++ }
        END { print (start == "'"$(saved)"'") ? count + 0 : 0 }'
}

# Whether the beginning of this life could be written down.
is_logged() {
    [ "$(of_chain 'field("event") == "begin" { last = field("job") "/" field("life") } END { print last }')" = "$job/$life" ]
}

stay() { # WHY EXIT_CODE
    write "event=end code=${code:-none} saved=$(saved) seconds=$seconds next=none"
    say "$1"
    exit "$2"
}

stalled() { # WHY LIVES
    [ "$2" -lt "$stalls_allowed" ] ||
        stay "$1, and $2 lives in a row saved nothing new: stays stopped" "${code:-1}"
}

# No further life beyond the bounds, whoever orders it.
bound() { # WHY LIVES-OF-THIS-JOB
    local lives used
    lives=$(of_chain 'field("event") == "begin" { count++ } END { print count + 0 }')
    [ "$lives" -ge "$2" ] || lives=$2 # a log that could not be written
    used=$((seconds + $(of_chain '{ sum += field("seconds") } END { print sum + 0 }')))
    if [ "$lives" -gt "${MAX_REQUEUES:-1000}" ]; then
        stay "$1, but came back $((lives - 1)) times already (MAX_REQUEUES): stays stopped" "${code:-1}"
    fi
    if [ "${TOTAL_MINUTES:-0}" -gt 0 ] && [ "$used" -ge $((TOTAL_MINUTES * 60)) ]; then
        stay "$1, but has used its $TOTAL_MINUTES minutes (TOTAL_MINUTES): stays stopped" "${code:-1}"
    fi
}

again() { # WHY COMMAND...
    local why=$1
    shift
    bound "$why" $((life + 1))
    stalled "$why" $(($(without_progress) + 1))
    write "event=end code=${code:-none} saved=$(saved) seconds=$seconds next=again $died"
    say "$why: requeued"
    if scontrol requeue "$job"; then
        exit "${code:-1}" # nothing here is sure to run any more
    fi
    say "SLURM does not requeue it (PreemptMode=CANCEL or JobRequeue=0?): submits a successor"
    for name in ${!SLURM_@}; do [ "$name" = SLURM_CONF ] || unset "$name"; done
    SBATCH_EXPORT=ALL DDPM_CHAIN=$chain "$@"
    local submitted=$?
    [ "$submitted" -eq 0 ] || say "no successor (exit code $submitted); submit the run again by hand"
    exit "${code:-1}"
}

# What SLURM says of this life: about, state; and how long it has lasted: seconds.
look() {
    local began
    for _ in {1..24}; do # the controller may be busy, or be restarted at this moment
        about=$(scontrol show job --oneliner "$job" | tr ' ' '\n')
        [ -z "$about" ] || break
        sleep 5
    done
    state=$(of_job JobState)
    began=$(of_chain 'field("event") == "begin" { since = field("time") } END { print since + 0 }')
    seconds=$((began > 0 ? $(date +%s) - began : 0))
}

# SIGNALING, SUSPENDED and the like are lives that go on.
is_over() {
    case $state in
        *COMPLETING* | COMPLETED | CANCELLED | FAILED | TIMEOUT | NODE_FAIL | PREEMPTED | DEADLINE | OUT_OF_MEMORY) ;;
        PENDING | REQUEUE*) ;;
        *) return 1 ;;
    esac
}

is_replaced() { local restarts; restarts=$(of_job Restarts); [ "${restarts:-0}" -gt "$life" ]; }

# At the time limit SLURM kills all after KillWait seconds, this shell too, perhaps before the launcher has ended: so
# the next life is ordered at once. It begins when this one is over, and sees what became of it.
told() {
    look
    if ! is_replaced && is_over && [ "$(of_job Reason):$(of_job Requeue)" = TimeLimit:1 ]; then
        again "time limit reached" true
    fi
}

end() {
    local launcher=$1
    shift
    code=$(exit_code)
    rm -f "${DDPM_EXIT_CODE_FILE:-}"
    look
    if is_replaced; then
        say "SLURM has requeued it already"
        exit "${code:-1}"
    fi
    case $code in
        0) stay "finished" 0 ;;
        65 | 76 | 78) stay "exit code $code: stays failed" "$code" ;;
    esac
    # While this shell runs, a job that SLURM has ended is COMPLETING, whatever it will be called afterwards.
    local why="preempted"
    [ "$code" = 75 ] || why="killed before it could save"
    if is_over; then
        case $(of_job Reason):$(of_job PreemptTime) in
            TimeLimit:*) again "time limit reached" "$@" ;;
            NodeDown:*) again "a node failed" "$@" ;;
            *:2*) again "$why" "$@" ;;
            *) stay "cancelled: stays stopped" "${code:-1}" ;;
        esac
    fi
    # 128 and a stop signal: it came before the launcher could listen.
    case $code:$(of_job PreemptTime):$launcher in
        75:* | :2* | :*:129 | :*:130 | :*:131 | :*:138 | :*:140 | :*:143) again "$why" "$@" ;;
    esac
    died=died=1
    if [ $(($(without_progress died) + 1)) -ge "$deaths_allowed" ]; then
        stay "exit code ${code:-none}, and $deaths_allowed lives in a row died and saved nothing new: stays failed" \
            "${code:-70}"
    fi
    again "exit code ${code:-none} (launcher $launcher)" "$@"
}

"$action" "$@"

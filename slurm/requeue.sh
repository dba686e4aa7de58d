#!/usr/bin/env bash
# What comes after a life of a SLURM job: nothing, or another life. Called in the batch shell of train.sbatch and of
# launch.submit, outside any container: needs bash, sed, awk, stat and scontrol.
#
#   requeue.sh begin RUN_DIR                        before the trainer starts
#   requeue.sh told RUN_DIR                         when SIGTERM came, while the trainer saves
#   requeue.sh end RUN_DIR EXIT_CODE COMMAND...     after it; COMMAND submits a successor where SLURM cannot requeue
#
# Reads status.json and $DDPM_EXIT_CODE_FILE; keeps RUN_DIR/slurm.log, a line for each beginning and end of a life.
# MAX_REQUEUES (1000) and TOTAL_MINUTES (0: any) bound the lives, those of successors included (DDPM_CHAIN).
set -uo pipefail
trap '' TERM INT HUP USR1 USR2 # SLURM ends the old life while this still works

action=$1 run=$2
shift 2
about="" state=""
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
# A run directory that is a link is the trainer's to judge: it may lead out of run.root.
write() {
    [ ! -L "$run" ] && mkdir -p "$run" 2>/dev/null || return 0
    echo "time=$(date +%s) chain=$chain job=$job life=$life $*" >>"$log" 2>/dev/null
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

begin() {
    # A life that SLURM or its node killed has left no end: it lasted until its last heartbeat.
    local open since last
    open=$(of_chain '{ event = field("event"); since = field("time") } END { print event == "begin" ? since : 0 }')
    if [ "$open" -gt 0 ]; then
        last=$(stat -c %Y "$run"/attempts/*.json 2>/dev/null | sort -n | tail -n 1)
        since=$((${last:-0} > open ? last - open : 0))
        write "event=killed seconds=$since"
    fi
    write "event=begin saved=$(saved) nodes=$SLURM_JOB_NODELIST"
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

# Lives in a row that saved nothing new, this one included; $1=died: those of them that died.
without_progress() {
    of_chain '
        field("event") == "begin" { if (start != field("saved")) count = 0; start = field("saved") }
        field("'"${1:-next}"'") != "" { count++ }
        END { print (start == "'"$(saved)"'") ? count + 1 : 0 }'
}

stay() { # WHY EXIT_CODE
    write "event=end code=${code:-none} saved=$(saved) seconds=$seconds next=none"
    say "$1"
    exit "$2"
}

again() { # WHY COMMAND...
    local why=$1 lives used
    shift
    lives=$(of_chain 'field("event") == "begin" { count++ } END { print count + 0 }')
    used=$((seconds + $(of_chain '{ sum += field("seconds") } END { print sum + 0 }')))
    if [ "$lives" -gt "${MAX_REQUEUES:-1000}" ]; then
        stay "$why, but came back $((lives - 1)) times already (MAX_REQUEUES): stays stopped" "${code:-1}"
    fi
    if [ "${TOTAL_MINUTES:-0}" -gt 0 ] && [ "$used" -ge $((TOTAL_MINUTES * 60)) ]; then
        stay "$why, but has used its $TOTAL_MINUTES minutes (TOTAL_MINUTES): stays stopped" "${code:-1}"
    fi
    if [ "$(without_progress)" -ge "$stalls_allowed" ]; then
        stay "$why, and $stalls_allowed lives in a row saved nothing new: stays stopped" "${code:-1}"
    fi
    write "event=end code=${code:-none} saved=$(saved) seconds=$seconds next=again $died"
    say "$why: requeued"
    if scontrol requeue "$job"; then
        exit "${code:-1}" # nothing here is sure to run any more
    fi
    say "SLURM does not requeue it (PreemptMode=CANCEL or JobRequeue=0?): submits a successor"
    for name in ${!SLURM_@}; do [ "$name" = SLURM_CONF ] || unset "$name"; done
    DDPM_CHAIN=$chain "$@"
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

is_replaced() { local restarts; restarts=$(of_job Restarts); [ "${restarts:-0}" -gt "$life" ]; }

# At the time limit SLURM kills all after KillWait seconds, this shell too, perhaps before the launcher has ended: so
# the next life is ordered at once. It begins when this one is over, and sees what became of it.
told() {
    code="" died=""
    look
    if ! is_replaced && [ "${state:-RUNNING}" != RUNNING ] && [ "$(of_job Reason):$(of_job Requeue)" = TimeLimit:1 ]; then
        again "time limit reached" true
    fi
}

end() {
    local launcher=$1
    shift
    code=$(exit_code) died=""
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
    if [ "${state:-RUNNING}" != RUNNING ]; then
        case $(of_job Reason):$(of_job PreemptTime) in
            TimeLimit:*) again "time limit reached" "$@" ;;
            *:2*) again "$why" "$@" ;;
            *) stay "cancelled: stays stopped" "${code:-1}" ;;
        esac
    fi
    # 128 and a stop signal: it came before the launcher could listen.
    case $code:$(of_job PreemptTime):$launcher in
        75:* | :2* | :*:129 | :*:130 | :*:131 | :*:138 | :*:140 | :*:143) again "$why" "$@" ;;
    esac
    died=died=1
    if [ "$(without_progress died)" -ge "$deaths_allowed" ]; then
        stay "exit code ${code:-none}, and $deaths_allowed lives in a row died and saved nothing new: stays failed" \
            "${code:-70}"
    fi
    again "exit code ${code:-none} (launcher $launcher)" "$@"
}

"$action" "$@"
